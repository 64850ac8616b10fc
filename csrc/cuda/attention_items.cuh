// How decode_attention is cut into work items. Everything but the order of items follows from the lengths alone.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

constexpr int kMaxRuns = 32;  // of one head: a warp merges them with a lane each

struct AttentionItem {
    int row, kv_head;
    int first_head, num_heads;    // query heads
    int run, num_runs;            // of this row
    int first_split, last_split;  // of this run
    int begin, end;               // positions the row attends to
    int arrival;                  // where finished runs are counted

    // Positions attended to in a split, counted from its beginning.
    __device__ int first_position(int split) const { return max(begin - split * kKvSplit, 0); }
    __device__ int last_position(int split) const { return min(end - split * kKvSplit, kKvSplit); }
    // Whether the split has the position that this step adds.
    __device__ bool has_newest(int split) const { return end <= (split + 1) * kKvSplit; }
};

// The items of all rows, in shared memory. kHeads: query heads that one item takes.
template <int kHeads>
struct AttentionItems {
    struct Row {
        int begin, end, first_split, splits_of_run, num_runs;
        int runs_up_to_here;  // of this row and those before it
    };
    Row rows[kMaxBatch];

    // By one warp, with a lane for each row. A row that is not wanted has no runs.
    __device__ void cut(const DecodeAttention& op, const int32_t* when) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        Row row{};
        if (lane < op.batch_size && ptx::load_relaxed(when + lane)) {
            row.end = ptx::load_relaxed(op.seq_len + lane) + 1;
            row.begin = op.sliding_window ? max(row.end - static_cast<int>(op.sliding_window), 0) : 0;
            row.first_split = row.begin / kKvSplit;
            const int splits = (row.end - 1) / kKvSplit - row.first_split + 1;
            row.splits_of_run = static_cast<int>(ceil_div(splits, kMaxRuns));
            row.num_runs = static_cast<int>(ceil_div(splits, row.splits_of_run));
        }
        row.runs_up_to_here = row.num_runs;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(kAllLanes, row.runs_up_to_here, distance);
            if (lane >= distance) row.runs_up_to_here += before;
        }
        if (lane < kMaxBatch) rows[lane] = row;
    }

    __device__ static int group(const DecodeAttention& op) {
        return static_cast<int>(op.num_attention_heads / op.num_key_value_heads);
    }
    // Items of one run: key/value heads, and parts of their query heads.
    __device__ static int items_of_run(const DecodeAttention& op) {
        return static_cast<int>(op.num_key_value_heads * ceil_div(group(op), kHeads));
    }
    __device__ int count(const DecodeAttention& op) const {
        return rows[kMaxBatch - 1].runs_up_to_here * items_of_run(op);
    }

    // 0 <= index < count(). Heads vary fastest, then runs, then rows.
    __device__ AttentionItem at(const DecodeAttention& op, int index) const {
        const int run = index / items_of_run(op), unit = index % items_of_run(op);
        AttentionItem item;
        item.row = 0;
        while (rows[item.row].runs_up_to_here <= run) ++item.row;
        const Row& row = rows[item.row];
        item.num_runs = row.num_runs;
        item.run = run - (row.runs_up_to_here - row.num_runs);
        item.begin = row.begin, item.end = row.end;
        item.first_split = row.first_split + item.run * row.splits_of_run;
        item.last_split = min(item.first_split + row.splits_of_run - 1, (row.end - 1) / kKvSplit);
        const int parts = static_cast<int>(ceil_div(group(op), kHeads)), part = unit % parts;
        item.kv_head = unit / parts;
        item.first_head = item.kv_head * group(op) + part * kHeads;
        item.num_heads = min(kHeads, group(op) - part * kHeads);
        item.arrival = item.row * items_of_run(op) + unit;
        return item;
    }
};

}  // namespace skipkernels::cuda
