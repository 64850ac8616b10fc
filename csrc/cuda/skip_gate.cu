// skip_gate as a kernel of its own: where it does not stand in front of a qkv_rope_append that takes it along. The
// kernel after this one may start while this one still waits, and load its first weights meanwhile.
#include "ops.h"
#include "skip_gate.cuh"

namespace skipkernels::cuda {

namespace {

__global__ void __launch_bounds__(kGateThreads)
    skip_gate_kernel(const __grid_constant__ SkipGate op, const int32_t* row_mask, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    clock.waited();
    decide(op, row_mask);
}

}  // namespace

cudaError_t launch_skip_gate(const Step& step, const LaunchContext& context) {
    const SkipGate& op = step.ins.skip_gate;
    return launch_kernel(context, skip_gate_kernel, 1, kGateThreads, gate_shared_bytes(op.num_sequences), op,
                         step.ins.row_mask, context.stamps);
}

}  // namespace skipkernels::cuda
