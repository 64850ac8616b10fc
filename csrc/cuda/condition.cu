#include "condition.h"

namespace skipkernels::cuda {

namespace {

__device__ bool any(const int32_t* flags, int64_t count) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) found |= flags[i] != 0;
    return found;
}

__global__ void if_any(cudaGraphConditionalHandle handle, const int32_t* row_mask, int64_t batch_size) {
    cudaGraphSetConditional(handle, any(row_mask, batch_size));
}

__global__ void while_any(cudaGraphConditionalHandle handle, const int32_t* active, int64_t batch_size,
                          int32_t* steps_left) {
    const int32_t left = --*steps_left;
    cudaGraphSetConditional(handle, left > 0 && any(active, batch_size));
}

cudaLaunchConfig_t one_thread(cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(1);
    config.stream = stream;
    return config;
}

}  // namespace

cudaError_t set_carveout_of_conditions(int carveout) {
    const cudaError_t error = cudaFuncSetAttribute(if_any, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(while_any, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
}

cudaError_t launch_if_any(cudaGraphConditionalHandle handle, const int32_t* row_mask, int64_t batch_size,
                          cudaStream_t stream) {
    const cudaLaunchConfig_t config = one_thread(stream);
    return cudaLaunchKernelEx(&config, if_any, handle, row_mask, batch_size);
}

cudaError_t launch_while_any(cudaGraphConditionalHandle handle, const int32_t* active, int64_t batch_size,
                             int32_t* steps_left, cudaStream_t stream) {
    const cudaLaunchConfig_t config = one_thread(stream);
    return cudaLaunchKernelEx(&config, while_any, handle, active, batch_size, steps_left);
}

}  // namespace skipkernels::cuda
