// hidden_states (rows, hidden) += o_proj (hidden, attention) @ attn_output (rows, attention) + bias
//
// Llama-2-7B, bf16: 4096 x 4096 weights, 34 MB, 7.8 us at 4.3 TB/s.
#include "linear_kernel.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

struct AddOProj {
    static constexpr bool kNormed = false, kFinishesTiles = false, kHasExtraBlock = false;
    using Early = float;  // what is added to
    OProjAdd op;

    __device__ Tile tile(int index) const { return tile_of_neighbours(index, op.hidden_size); }
    __device__ float* hidden(int index, int row, int r) const {
        return op.hidden_states + row * op.hidden_size + int64_t{index} * kTileRows + r;
    }
    __device__ float early(int index, int row, int r) const {
        if (!tile(index).has(r)) return 0.0f;
        return *hidden(index, row, r) + (op.o_proj_bias ? op.o_proj_bias[int64_t{index} * kTileRows + r] : 0.0f);
    }
    __device__ void touch(int index, int, int r) const {
        if (op.o_proj_bias && tile(index).has(r)) ptx::touch(op.o_proj_bias + int64_t{index} * kTileRows + r);
    }
    __device__ void operator()(int index, int row, int r, float value, float before) const {
        if (row >= 0 && tile(index).has(r)) *hidden(index, row, r) = before + value;
    }
};

}  // namespace

cudaError_t launch_o_proj_add(const Step& step, const LaunchContext& context) {
    const OProjAdd& op = step.ins.o_proj_add;
    return launch_projection(step, op.o_proj, op.attn_output, op.attention_size, ceil_div(op.hidden_size, kTileRows),
                             AddOProj{op}, context);
}

}  // namespace skipkernels::cuda
