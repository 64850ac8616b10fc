// Kernels that set the value of a conditional node from flags on the device. Neither is launched programmatically: an
// edge into a conditional node must be a full dependency.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace skipkernels::cuda {

// The share of L1 that both ask for, as in LaunchContext (kernels.h): an SM does not change it while
// another kernel runs there.
cudaError_t set_carveout_of_conditions(int carveout);

// handle = any of row_mask[batch_size]
cudaError_t launch_if_any(cudaGraphConditionalHandle handle, const int32_t* row_mask, int64_t batch_size,
                          cudaStream_t stream);

// *steps_left -= 1; handle = *steps_left > 0 and any of active[batch_size]
cudaError_t launch_while_any(cudaGraphConditionalHandle handle, const int32_t* active, int64_t batch_size,
                             int32_t* steps_left, cudaStream_t stream);

}  // namespace skipkernels::cuda
