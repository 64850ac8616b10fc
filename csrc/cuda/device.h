// What the launches of one device have in common.
#pragma once

#include <cuda_runtime.h>

namespace skipkernels::cuda {

int attribute_of(int device, cudaDeviceAttr name);

// The share of an SM's L1, in percent, with which two matrix kernels fit there side by side. One for all
// kernels: an SM changes it only when it is idle, so kernels that differ in it cannot overlap.
int carveout_of(int device);

}  // namespace skipkernels::cuda
