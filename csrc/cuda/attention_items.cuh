// How decode_attention is cut into work items. Everything but the order of items follows from the lengths alone.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

constexpr int kMaxRuns = 32;  // of one head: a warp merges them with a lane each

struct AttentionItem {
    int row, sequence, kv_head;
    int first_head, num_heads;    // query heads
    int run, num_runs;            // of this row
    int first_split, last_split;  // of this run
    int begin, end;               // positions the row attends to
    int arrival;                  // where finished runs are counted

    // Positions attended to in a split, counted from its beginning.
    __device__ int first_position(int split) const { return max(begin - split * kKvSplit, 0); }
    __device__ int last_position(int split) const { return min(end - split * kKvSplit, kKvSplit); }
    // Whether the split has the row's own position.
    __device__ bool has_newest(int split) const { return end <= (split + 1) * kKvSplit; }
};

// The runs into which a row's positions [begin, end) are cut.
struct AttentionRuns {
    int begin, first_split, splits_of_run, count;

    __device__ AttentionRuns(const DecodeAttention& op, int end) {
        begin = op.sliding_window ? max(end - static_cast<int>(op.sliding_window), 0) : 0;
        first_split = begin / kKvSplit;
        const int splits = (end - 1) / kKvSplit - first_split + 1;
        splits_of_run = static_cast<int>(ceil_div(splits, kMaxRuns));
        count = static_cast<int>(ceil_div(splits, splits_of_run));
    }
};

struct AttentionRow {
    int end, sequence;
    int runs_up_to_here;  // of this row and those before it
};

// The items of all rows. kHeads: query heads that one item takes.
template <int kHeads>
struct AttentionItems {
    AttentionRow* rows;  // (num_rows), in shared memory
    int num_rows;

    // By one warp. A row that is not wanted has no runs. Returns whether there is a prompt row.
    __device__ bool cut(const DecodeAttention& op, const int32_t* row_mask) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        int runs_before = 0;
        bool has_prompt = false;
        for (int first = 0; first < num_rows; first += 32) {
            const int index = first + lane;
            const bool wanted = index < num_rows && ptx::load_relaxed(row_mask + index) != 0;
            AttentionRow row{};
            if (wanted) {
                row.end = ptx::load_relaxed(op.row_position + index) + 1;
                row.sequence = ptx::load_relaxed(op.row_sequence + index);
                row.runs_up_to_here = AttentionRuns(op, row.end).count;
                has_prompt |= index >= op.num_sequences;
            }
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int before = __shfl_up_sync(kAllLanes, row.runs_up_to_here, distance);
                if (lane >= distance) row.runs_up_to_here += before;
            }
            row.runs_up_to_here += runs_before;
            runs_before = __shfl_sync(kAllLanes, row.runs_up_to_here, 31);
            if (index < num_rows) rows[index] = row;
        }
        return __ballot_sync(kAllLanes, has_prompt) != 0;
    }

    __device__ static int group(const DecodeAttention& op) {
        return static_cast<int>(op.num_attention_heads / op.num_key_value_heads);
    }
    // Items of one run: key/value heads, and parts of their query heads.
    __device__ static int items_of_run(const DecodeAttention& op) {
        return static_cast<int>(op.num_key_value_heads * ceil_div(group(op), kHeads));
    }
    __device__ int count(const DecodeAttention& op) const {
        return rows[num_rows - 1].runs_up_to_here * items_of_run(op);
    }

    // 0 <= index < count(). Heads vary fastest, then runs, then rows.
    __device__ AttentionItem at(const DecodeAttention& op, int index) const {
        const int run = index / items_of_run(op), unit = index % items_of_run(op);
        AttentionItem item;
        item.row = 0;
        for (int above = num_rows - 1; item.row < above;) {  // the first row whose runs go beyond this one
            const int middle = (item.row + above) / 2;
            if (rows[middle].runs_up_to_here > run) {
                above = middle;
            } else {
                item.row = middle + 1;
            }
        }
        const AttentionRow& row = rows[item.row];
        const AttentionRuns runs(op, row.end);
        item.sequence = row.sequence;
        item.num_runs = runs.count;
        item.run = run - (row.runs_up_to_here - runs.count);
        item.begin = runs.begin, item.end = row.end;
        item.first_split = runs.first_split + item.run * runs.splits_of_run;
        item.last_split = min(item.first_split + runs.splits_of_run - 1, (row.end - 1) / kKvSplit);
        const int parts = static_cast<int>(ceil_div(group(op), kHeads)), part = unit % parts;
        item.kv_head = unit / parts;
        item.first_head = item.kv_head * group(op) + part * kHeads;
        item.num_heads = min(kHeads, group(op) - part * kHeads);
        item.arrival = item.row * items_of_run(op) + unit;
        return item;
    }
};

}  // namespace skipkernels::cuda
