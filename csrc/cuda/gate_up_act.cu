// intermediate (rows, intermediate) = act(gate @ x) * (up @ x), x = rms_norm(hidden_states);
// gate_up_proj (2 intermediate, hidden) holds the gate rows, then the up rows. A tile is 8 of both.
//
// Llama-2-7B, bf16: 22016 x 4096 weights, 180 MB, 42 us at 4.3 TB/s. Skipped, it costs its launch.
#include "activation.cuh"
#include "linear_kernel.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

template <bool kHasNorm>
struct ActGateUp {
    static constexpr bool kNormed = kHasNorm, kFinishesTiles = false, kHasExtraBlock = false;
    struct Early {};
    GateUpAct op;

    __device__ Tile tile(int index) const {
        const int64_t first = int64_t{index} * kRunRows;
        const int count = static_cast<int>(min(int64_t{kRunRows}, op.intermediate_size - first));
        return {{first, op.intermediate_size + first}, {count, count}};
    }
    __device__ Early early(int, int, int) const { return {}; }
    __device__ void touch(int, int, int) const {}
    __device__ void operator()(int index, int row, int r, float gate, Early) const {
        const float up = __shfl_xor_sync(kAllLanes, gate, kRunRows);
        if (row < 0 || r >= kRunRows || !tile(index).has(r)) return;
        op.intermediate[row * op.intermediate_size + int64_t{index} * kRunRows + r] =
            gated(static_cast<Activation>(op.activation), gate, up);
    }
};

template <bool kNormed>
cudaError_t launch_way(const Step& step, const LaunchContext& context) {
    const GateUpAct& op = step.ins.gate_up_act;
    const ActGateUp<kNormed> epilogue{op};
    const int64_t tiles = ceil_div(op.intermediate_size, kRunRows);
    if (op.gate_up_proj.num_parts == 1) {
        return launch_projection(step, op.gate_up_proj, op.hidden_states, op.hidden_size, tiles, epilogue, context,
                                 op.post_attention_layernorm, op.rms_norm_eps);
    }
    // gate and up apart; check() has seen that they share a format
    return with_block_format(op.gate_up_proj.format, [&](auto format) {
        auto in = make_block_linear<decltype(format)::value>(step, op.gate_up_proj.parts[0], op.gate_up_proj.parts[1],
                                                             op.hidden_states, op.hidden_size, tiles,
                                                             op.post_attention_layernorm, op.rms_norm_eps);
        in.first_row[1] = op.intermediate_size;
        return launch_linear(in, epilogue, context);
    });
}

}  // namespace

cudaError_t launch_gate_up_act(const Step& step, const LaunchContext& context) {
    if (!step.ins.gate_up_act.post_attention_layernorm) return launch_way<false>(step, context);
    return launch_way<true>(step, context);
}

}  // namespace skipkernels::cuda
