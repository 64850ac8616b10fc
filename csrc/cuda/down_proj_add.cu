// hidden_states (rows, hidden) += down_proj (hidden, intermediate) @ intermediate (rows, intermediate)
// and, where asked for, of decode rows similarity_partials (tiles, sequences, 3): sums of h h', h^2 and h'^2 over the
// tile's 16 channels, taken while both are in registers. The similarity test costs no pass of its own.
//
// Llama-2-7B, bf16: 4096 x 11008 weights, 90 MB, 21 us at 4.3 TB/s; all else is below 0.1 MB.
#include "linear_kernel.cuh"
#include "ops.h"
#include "residual.cuh"

namespace skipkernels::cuda {

namespace {

struct AddDownProj {
    static constexpr bool kNormed = false, kFinishesTiles = false, kHasExtraBlock = false;
    using Early = float;  // h
    DownProjAdd op;

    __device__ Tile tile(int index) const { return tile_of_neighbours(index, op.hidden_size); }
    __device__ float* hidden(int index, int row, int r) const {
        return op.hidden_states + row * op.hidden_size + int64_t{index} * kTileRows + r;
    }
    __device__ float early(int index, int row, int r) const {
        return tile(index).has(r) ? *hidden(index, row, r) : 0.0f;
    }
    __device__ void touch(int, int, int) const {}
    __device__ void operator()(int index, int row, int r, float value, float before) const {
        const bool has_channel = row >= 0 && tile(index).has(r);
        const float after = before + value;
        if (has_channel) *hidden(index, row, r) = after;
        if (!op.similarity_partials) return;
        const bool compared = row >= 0 && row < op.num_sequences;
        compare_channels(compared ? op.similarity_partials + (index * op.num_sequences + row) * 3 : nullptr,
                         has_channel, before, after);
    }
};

}  // namespace

cudaError_t launch_down_proj_add(const Step& step, const LaunchContext& context) {
    const DownProjAdd& op = step.ins.down_proj_add;
    return launch_projection(step, op.down_proj, op.intermediate, op.intermediate_size,
                             ceil_div(op.hidden_size, kTileRows), AddDownProj{op}, context);
}

}  // namespace skipkernels::cuda
