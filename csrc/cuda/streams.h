// What one may ask of a stream of the user's. A handle alone does not name a stream: 0 is the default stream of
// whichever device is current.
#pragma once

#include <cuda_runtime.h>

namespace skipkernels::cuda {

void synchronize(cudaStream_t stream, int device);
// Whether work is left in it. Like synchronize(), throws what the work threw.
bool is_busy(cudaStream_t stream, int device);
bool is_capturing(cudaStream_t stream, int device);

}  // namespace skipkernels::cuda
