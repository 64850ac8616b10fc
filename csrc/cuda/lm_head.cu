// logits (sequences, vocab) = lm_head (vocab, hidden) @ rms_norm(hidden_states) of the decode rows, which are the first
// rows
//
// Llama-3-8B, bf16: 128256 x 4096 weights, 1.05 GB, 244 us at 4.3 TB/s.
#include "activation.cuh"
#include "linear_kernel.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

struct StoreLogits {
    static constexpr bool kNormed = true, kFinishesTiles = false, kHasExtraBlock = false;
    struct Early {};
    LmHead op;

    __device__ Tile tile(int index) const { return tile_of_neighbours(index, op.vocab_size); }
    __device__ Early early(int, int, int) const { return {}; }
    __device__ void touch(int, int, int) const {}
    __device__ void operator()(int index, int row, int r, float value, Early) const {
        if (row < 0 || !tile(index).has(r)) return;
        op.logits[row * op.vocab_size + int64_t{index} * kTileRows + r] =
            op.softcap > 0.0f ? softened(op.softcap, value) : value;
    }
};

}  // namespace

cudaError_t launch_lm_head(const Step& step, const LaunchContext& context) {
    const LmHead& op = step.ins.lm_head;
    return launch_projection(step, op.lm_head, op.hidden_states, op.hidden_size, ceil_div(op.vocab_size, kTileRows),
                             StoreLogits{op}, context, op.norm, op.rms_norm_eps);
}

}  // namespace skipkernels::cuda
