// The decision of run_ffn[layer] of every sequence by its own policy: FFN-SkipLLM's similarity rule (arXiv 2404.03865),
// a fixed set, or a random draw. By one block, of a kernel of its own or beside the blocks of another.
//
// The decision is compared with the other executors' bit by bit, so the partial sums are added one after the other in
// their order, by a thread for each sequence and sum, and no multiplication is fused with an addition (setup.py
// compiles the files that include this one with -fmad=false). Llama-2-7B has 256 partials: 256 additions of 4 cycles
// are 0.6 us.
#pragma once

#include "common.cuh"
#include "philox.h"
#include "ratio_controller.h"

namespace skipkernels::cuda {

constexpr int kGateThreads = 256;
constexpr int kSequencesOfTurn = 64;  // whose partials are added at a time
constexpr int kStagedFloats = 8 * 1024;

// What a sequence with a similarity gate here wants, before those of its batch rule have spoken.
struct Wish {
    int32_t span;
    bool is_gated, warm, triggered;
};

// Shared memory. Behind it: a wish of each sequence.
struct GateShared {
    float staged[kStagedFloats];
    float sums[kSequencesOfTurn][3];
    bool measures[kSequencesOfTurn / 32];
    __device__ Wish* wishes() { return reinterpret_cast<Wish*>(this + 1); }
};

__host__ __device__ constexpr size_t gate_shared_bytes(int64_t num_sequences) {
    return sizeof(GateShared) + static_cast<size_t>(num_sequences) * sizeof(Wish);
}

// Partial sums (num_partials, sequences, 3) of the sequences from `first` on -> sums. By the whole block.
__device__ __forceinline__ void add_partials(const SkipGate& op, int first, GateShared& shared) {
    const int thread = ptx::thread_index(), row = static_cast<int>(3 * op.num_sequences);
    const int width = 3 * min(kSequencesOfTurn, static_cast<int>(op.num_sequences) - first);
    const int total = static_cast<int>(op.num_partials) * width, step = kStagedFloats / width * width;
    static_assert(3 * kSequencesOfTurn <= kGateThreads);
    float sum = 0.0f;
    for (int begin = 0; begin < total; begin += step) {
        const int count = min(step, total - begin);
        for (int i = thread; i < count; i += kGateThreads) {
            const int in_turn = begin + i;
            const int64_t at = width == row ? in_turn : int64_t{in_turn / width} * row + 3 * first + in_turn % width;
            shared.staged[i] = op.similarity_partials[at];
        }
        __syncthreads();
        if (thread < width) {
#pragma unroll 8
            for (int i = thread; i < count; i += width) sum += shared.staged[i];
        }
        __syncthreads();
    }
    if (thread < width) shared.sums[thread / 3][thread % 3] = sum;
    __syncthreads();
}

// `sums`: <h, h'>, |h|^2, |h'|^2 across the FFN before, where it ran.
__device__ __forceinline__ Wish measure(const SkipGate& op, int sequence, const float (&sums)[3]) {
    const bool held = op.target_ratio[sequence] > 0, warm = op.num_generated[sequence] >= op.warmup_tokens[sequence];
    const RatioController controller(op, sequence);
    float& scale = op.threshold_scale[sequence];
    if (held && warm && op.layer == op.first_gated[sequence]) scale = controller.adapted(scale);
    Wish wish{op.gate_span[sequence], true, warm, false};
    if (!op.run_ffn[(op.layer - 1) * op.num_rows + sequence]) return wish;
    const int64_t tested = (op.layer - 1) * op.num_sequences + sequence;
    const float norm = sqrtf(sums[1]) * sqrtf(sums[2]), threshold = op.gate_threshold[tested];
    const float similarity = norm > 0 ? sums[0] / norm : 0.0f;  // 0 for a zero vector
    op.similarity[tested] = similarity;
    if (held) wish.span = static_cast<int32_t>(min(int64_t{wish.span}, controller.allowed()));
    wish.triggered = warm && (held ? controller.triggers(similarity, threshold, scale) : similarity >= threshold);
    return wish;
}

// Whether the sequence starts to skip, given what those of the same batch rule want.
__device__ __forceinline__ bool starts(const SkipGate& op, int sequence, const Wish* wishes) {
    const auto rule = static_cast<BatchRule>(op.batch_rule[sequence]);
    if (rule == BatchRule::per_row) return wishes[sequence].triggered;
    int fellows = 0, wanting = 0;
    bool all_warm = true;
    for (int other = 0; other < op.num_sequences; ++other) {
        if (!wishes[other].is_gated || op.batch_rule[other] != op.batch_rule[sequence]) continue;
        ++fellows;
        wanting += wishes[other].triggered;
        all_warm &= wishes[other].warm;
    }
    return all_warm && wanting >= (rule == BatchRule::all ? fellows : fellows / 2 + 1);
}

__device__ __forceinline__ void follow(const SkipGate& op, int sequence, const Wish* wishes) {
    int32_t remaining = op.skip_remaining[sequence];
    if (starts(op, sequence, wishes)) remaining = wishes[sequence].span;
    if (remaining > 0) {
        --remaining;
        ++op.skipped[sequence];
        op.run_ffn[op.layer * op.num_rows + sequence] = 0;
    }
    op.skip_remaining[sequence] = remaining;
}

__device__ __forceinline__ void gate_by_draw(const SkipGate& op, int sequence, bool is_random) {
    const int32_t step = op.num_generated[sequence];
    if (step < op.warmup_tokens[sequence]) return;
    double draw = -1.0;
    if (is_random) {
        draw = philox_uniform(static_cast<uint64_t>(op.gate_seed[sequence]), static_cast<uint32_t>(op.layer),
                              static_cast<uint32_t>(step), kGateStream);
    }
    if (draw < op.gate_probability[sequence]) op.run_ffn[op.layer * op.num_rows + sequence] = 0;
}

// By a block of kGateThreads with gate_shared_bytes() of shared memory, behind grid_dependency_wait().
__device__ __forceinline__ void decide(const SkipGate& op, const int32_t* row_mask) {
    auto& shared = *reinterpret_cast<GateShared*>(ptx::shared_memory());
    const int sequences = static_cast<int>(op.num_sequences), thread = static_cast<int>(threadIdx.x);
    for (int first = 0; first < sequences; first += kSequencesOfTurn) {
        const int own = first + thread;
        const bool takes_part = thread < kSequencesOfTurn && own < sequences;
        auto mode = GateMode::dense;
        if (takes_part && row_mask[own] && op.gated[op.layer * sequences + own]) {
            mode = static_cast<GateMode>(op.gate_mode[own]);
        }
        const bool measures = mode == GateMode::similarity && op.run_ffn[(op.layer - 1) * op.num_rows + own];
        const bool in_warp = __ballot_sync(kAllLanes, measures) != 0;
        __syncthreads();  // nobody reads what the last turn left any more
        if (thread < kSequencesOfTurn && thread % 32 == 0) shared.measures[thread / 32] = in_warp;
        __syncthreads();
        bool any = false;
        for (const bool of_warp : shared.measures) any |= of_warp;
        if (any) add_partials(op, first, shared);
        Wish wish{};
        if (mode == GateMode::similarity) {
            wish = measure(op, own, shared.sums[thread]);
        } else if (mode != GateMode::dense) {
            gate_by_draw(op, own, mode == GateMode::random);
        }
        if (takes_part) shared.wishes()[own] = wish;
    }
    __syncthreads();
    for (int own = thread; own < sequences; own += kGateThreads) {
        if (shared.wishes()[own].is_gated) follow(op, own, shared.wishes());
    }
}

// The same for kernels that take a gate along, and have not a register to spare.
__device__ __attribute__((noinline)) inline void decide_apart(const SkipGate& op, const int32_t* row_mask) {
    decide(op, row_mask);
}

}  // namespace skipkernels::cuda
