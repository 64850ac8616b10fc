// For the kernels of these tests: sources see the same two headers as those in csrc/cuda.
#pragma once

#include <cuda_runtime.h>

#include "ptx_host.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace ptx = skipkernels::cuda::ptx;

// Launches on stream 0 and returns the error of the launch.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}
