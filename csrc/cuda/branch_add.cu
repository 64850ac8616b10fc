// hidden_states (rows, hidden) += multiplier * rms_norm(branch (rows, hidden)), or * branch without a norm; branch = 0
// and, where asked for, of decode rows similarity_partials (tiles, sequences, 3), as down_proj_add has them.
//
// A block is a row. Some 50 KB move for a row of 4096 channels: it costs its launch.
#include "block_sum.cuh"
#include "ops.h"
#include "residual.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads)
    branch_add_kernel(const __grid_constant__ BranchAdd op, const int32_t* row_mask, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.x;
    if (!row_mask[row]) return;
    float *branch = op.branch + row * op.hidden_size, *hidden = op.hidden_states + row * op.hidden_size;
    const int thread = static_cast<int>(threadIdx.x);
    float scale = 1.0f;
    if (op.norm) {
        float squares = 0.0f;
        for (int64_t i = thread; i < op.hidden_size; i += kThreads) squares = fmaf(branch[i], branch[i], squares);
        squares = block_sum(squares, reinterpret_cast<float*>(ptx::shared_memory()));
        scale = 1.0f / sqrtf(squares / static_cast<float>(op.hidden_size) + op.rms_norm_eps);
    }
    const bool compared = op.similarity_partials && row < op.num_sequences;
    for (int64_t first = 0; first < op.hidden_size; first += kThreads) {  // whole warps, for the shuffles
        const int64_t i = first + thread;
        const bool inside = i < op.hidden_size;
        float before = 0.0f, after = 0.0f;
        if (inside) {
            before = hidden[i];
            after = before + branch[i] * scale * (op.norm ? op.norm[i] : 1.0f) * op.multiplier;
            hidden[i] = after;
            branch[i] = 0.0f;
        }
        if (!compared) continue;
        const int64_t partial = i / kRowsPerPartial;
        const bool exists = partial < op.num_partials;
        compare_channels(exists ? op.similarity_partials + (partial * op.num_sequences + row) * 3 : nullptr, inside,
                         before, after);
    }
}

}  // namespace

cudaError_t launch_branch_add(const Step& step, const LaunchContext& context) {
    const BranchAdd& op = step.ins.branch_add;
    return launch_kernel(context, branch_add_kernel, static_cast<unsigned>(op.num_rows), kThreads,
                         kWarps * sizeof(float), op, step.ins.row_mask, context.stamps);
}

}  // namespace skipkernels::cuda
