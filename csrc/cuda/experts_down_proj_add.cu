// hidden_states (rows, hidden) += sum over a row's chosen experts, in the order of their ids, of weight * (down_proj
// (experts, hidden, expert) @ expert_intermediate (rows, choices, expert) + down_proj_bias (experts, hidden)).
// similarity_partials as for down_proj_add.
//
// A block is 16 channels of one row, a partial of the similarity test; a warp is a channel. Rows with the same expert
// run next to one another and share its weights in L2.
//
// Qwen3-30B-A3B, bf16, one row: 8 experts of 2048 x 768 weights, 25 MB, 6 us at 4.3 TB/s.
#include "experts.cuh"
#include "ops.h"
#include "residual.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 32 * kRowsPerPartial;

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    experts_down_proj_add_kernel(const __grid_constant__ ExpertsDownProjAdd op, const int32_t* row_mask,
                                 uint64_t policy, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.x;
    if (!row_mask[row]) return;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t first = int64_t{blockIdx.y} * kRowsPerPartial, channel = first + warp, size = op.expert_size;
    const int listed = op.expert_begins[op.num_begins - 1];
    float sum = 0.0f;
    for (int entry = 0; entry < listed && channel < op.hidden_size; ++entry) {
        const int pair = op.expert_pairs[entry];
        if (pair / op.experts_per_token != row) continue;
        const int64_t expert = expert_at(op.expert_begins, op.num_begins, entry);
        const T* w = static_cast<const T*>(op.down_proj.data) + (expert * op.hidden_size + channel) * size;
        const float product = warp_dot<T, V>(w, op.expert_intermediate + pair * size, static_cast<int>(size), policy);
        sum = fmaf(op.expert_weights[pair], product, sum);
    }
    auto* changes = reinterpret_cast<float*>(ptx::shared_memory());
    if (lane == 0) changes[warp] = sum;
    __syncthreads();
    if (warp != 0) return;
    const bool inside = lane < kRowsPerPartial && first + lane < op.hidden_size;
    float before = 0.0f, after = 0.0f;
    if (inside) {
        float& hidden = op.hidden_states[row * op.hidden_size + first + lane];
        before = hidden;
        hidden = after = before + (changes[lane] + biases_of(op, row, first + lane));
    }
    if (!op.similarity_partials || row >= op.num_sequences) return;
    float* part = op.similarity_partials + (blockIdx.y * op.num_sequences + row) * 3;
    compare_channels(lane < kRowsPerPartial ? part : nullptr, inside, before, after);
}

}  // namespace

cudaError_t launch_experts_down_proj_add(const Step& step, const LaunchContext& context) {
    const ExpertsDownProjAdd& op = step.ins.experts_down_proj_add;
    return with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kVector<T>;
        // a vector of V weights goes with one of V activations, which are aligned where their number is
        const bool vectors =
            op.expert_size % V == 0 && is_aligned(op.down_proj.data) && is_aligned(op.expert_intermediate);
        auto kernel = vectors ? experts_down_proj_add_kernel<T, V> : experts_down_proj_add_kernel<T, 1>;
        const dim3 grid(static_cast<unsigned>(op.num_rows),
                        static_cast<unsigned>(ceil_div(op.hidden_size, kRowsPerPartial)));
        return launch_kernel(context, kernel, grid, kThreads, kRowsPerPartial * sizeof(float), op, step.ins.row_mask,
                             step.evicts_first ? kEvictFirst : kEvictNormal, context.stamps);
    });
}

}  // namespace skipkernels::cuda
