// The decision of run_ffn[layer] per row: FFN-SkipLLM's similarity rule (arXiv 2404.03865), a fixed set, or a random
// draw. By one block, of a kernel of its own or beside the blocks of another.
//
// The decision is compared with the other executors' bit by bit, so the partial sums are added one after the other in
// their order, by a thread for each row and sum, and no multiplication is fused with an addition (setup.py compiles the
// files that include this one with -fmad=false). Llama-2-7B has 256 partials: 256 additions of 4 cycles are 0.6 us.
#pragma once

#include "common.cuh"
#include "philox.h"
#include "ratio_controller.h"

namespace skipkernels::cuda {

constexpr int kGateThreads = 256;
constexpr int kStagedFloats = 8 * 1024;
constexpr size_t kGateSharedBytes = (kStagedFloats + 3 * kMaxBatch) * sizeof(float);

// Partial sums (num_partials, batch, 3) -> shared sums [batch][3]. By the whole block.
__device__ __forceinline__ const float* add_partials(const SkipGate& op) {
    auto* staged = reinterpret_cast<float*>(ptx::shared_memory());
    float* sums = staged + kStagedFloats;
    const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(3 * op.batch_size);
    const int total = static_cast<int>(op.num_partials) * width, step = kStagedFloats / width * width;
    float sum = 0.0f;
    for (int begin = 0; begin < total; begin += step) {
        const int count = min(step, total - begin);
        for (int i = thread; i < count; i += kGateThreads) staged[i] = op.similarity_partials[begin + i];
        __syncthreads();
        if (thread < width) {
#pragma unroll 8
            for (int i = thread; i < count; i += width) sum += staged[i];
        }
        __syncthreads();
    }
    if (thread < width) sums[thread] = sum;
    __syncthreads();
    return sums;
}

// By one warp, whose lane is the row.
__device__ __forceinline__ void gate_by_similarity(const SkipGate& op, const Rows& rows, const float* sums) {
    const int row = static_cast<int>(threadIdx.x);
    const bool wanted = rows.set >> row & 1, warm = wanted && op.generated[row] >= op.warmup_tokens;
    bool triggered = false;
    int64_t span = op.span;
    if (wanted) {
        const bool held = op.target_ratio > 0;
        const RatioController controller(op, row);
        if (held && warm && op.first_gate) op.threshold_scale[row] = controller.adapted(op.threshold_scale[row]);
        const int64_t tested = (op.layer - 1) * op.batch_size + row;
        if (op.run_ffn[tested]) {
            const float norm = sqrtf(sums[3 * row + 1]) * sqrtf(sums[3 * row + 2]);
            const float similarity = norm > 0 ? sums[3 * row] / norm : 0.0f;  // 0 for a zero vector
            op.similarity[tested] = similarity;
            if (held) span = min(span, controller.allowed());
            triggered = warm && (held ? controller.triggers(similarity, op.threshold, op.threshold_scale[row])
                                      : similarity >= op.threshold);
        }
    }
    const auto rule = static_cast<BatchRule>(op.batch_rule);
    const int wanting = __popc(__ballot_sync(kAllLanes, triggered));
    const bool all_warm = __ballot_sync(kAllLanes, warm) == rows.set;
    const int needed = rule == BatchRule::all ? rows.count() : rows.count() / 2 + 1;
    if (!wanted) return;
    int32_t remaining = op.skip_remaining[row];
    if (rule == BatchRule::per_row ? triggered : all_warm && wanting >= needed) remaining = static_cast<int32_t>(span);
    if (remaining > 0) {
        --remaining;
        ++op.skipped[row];
        op.run_ffn[op.layer * op.batch_size + row] = 0;
    }
    op.skip_remaining[row] = remaining;
}

__device__ __forceinline__ void gate_by_draw(const SkipGate& op, int row) {
    if (op.generated[row] < op.warmup_tokens) return;
    double draw = 0.0;
    if (static_cast<GateMode>(op.mode) == GateMode::random) {
        draw = philox_uniform(static_cast<uint64_t>(op.seed), static_cast<uint32_t>(op.layer),
                              static_cast<uint32_t>(op.generated[row]), kGateStream);
    }
    if (draw < op.probability) op.run_ffn[op.layer * op.batch_size + row] = 0;
}

// By a block of kGateThreads with kGateSharedBytes of shared memory, behind grid_dependency_wait().
__device__ __forceinline__ void decide(const SkipGate& op, const int32_t* when) {
    const Rows rows(when, static_cast<int>(op.batch_size));
    const int thread = static_cast<int>(threadIdx.x);
    if (static_cast<GateMode>(op.mode) == GateMode::similarity) {
        const float* sums = add_partials(op);
        if (thread < 32) gate_by_similarity(op, rows, sums);
    } else if (thread < 32 && rows.set >> thread & 1) {
        gate_by_draw(op, thread);
    }
}

// The same for kernels that take a gate along, and have not a register to spare.
__device__ __attribute__((noinline)) inline void decide_apart(const SkipGate& op, const int32_t* when) {
    decide(op, when);
}

}  // namespace skipkernels::cuda
