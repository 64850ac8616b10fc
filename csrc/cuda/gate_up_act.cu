// intermediate (rows, intermediate) = act(gate @ x) * (up @ x), x = rms_norm(hidden_states);
// gate_up_proj (2 intermediate, hidden) holds the gate rows, then the up rows. A tile is 8 of both.
//
// Llama-2-7B, bf16: 22016 x 4096 weights, 180 MB, 42 us at 4.3 TB/s. Skipped, it costs its launch.
#include "activation.cuh"
#include "linear_kernel.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

struct ActGateUp {
    static constexpr bool kNormed = true, kFinishesTiles = false, kHasExtraBlock = false;
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
            activated(static_cast<Activation>(op.activation), gate) * up;
    }
};

}  // namespace

cudaError_t launch_gate_up_act(const Step& step, const LaunchContext& context) {
    const GateUpAct& op = step.ins.gate_up_act;
    return with_float_type(op.gate_up_proj.format, [&](auto type) {
        const auto in = make_linear<decltype(type)>(step, op.gate_up_proj.data, op.hidden_states, op.hidden_size,
                                                    ceil_div(op.intermediate_size, kRunRows),
                                                    op.post_attention_layernorm, op.rms_norm_eps);
        return launch_linear(in, ActGateUp{op}, context);
    });
}

}  // namespace skipkernels::cuda
