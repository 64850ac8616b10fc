// neuron_scale of each decode row: 0 in its sequence's warm-up, then the factor on its thresholds for neurons.
//
// Compared with the other executors' bit by bit: no multiplication is fused with an addition (setup.py).
#include "common.cuh"
#include "ops.h"
#include "ratio_controller.h"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 128;

__device__ float scale_of(const NeuronGate& op, int row) {
    if (op.num_generated[row] < op.warmup_tokens[row]) return 0.0f;
    const float scale = op.threshold_scale[row];
    if (!(op.neuron_target_ratio[row] > 0)) return scale;
    const NeuronController controller(op, row);
    return controller.neuron_scale(op.threshold_scale[row] = controller.adapted(scale));
}

__global__ void __launch_bounds__(kThreads)
    neuron_gate_kernel(const __grid_constant__ NeuronGate op, const int32_t* row_mask, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    for (int row = static_cast<int>(threadIdx.x); row < op.num_sequences; row += kThreads) {
        if (!row_mask[row]) continue;
        const float scale = scale_of(op, row);
        op.neuron_scale[row] = scale;
        op.scale_map[row * op.max_seq_len + op.num_generated[row]] = scale;
    }
}

}  // namespace

cudaError_t launch_neuron_gate(const Step& step, const LaunchContext& context) {
    return launch_kernel(context, neuron_gate_kernel, 1, kThreads, 0, step.ins.neuron_gate, step.ins.row_mask,
                         context.stamps);
}

}  // namespace skipkernels::cuda
