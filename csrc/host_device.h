// Marks functions that both the CPU and the CUDA kernels use.
#pragma once

#ifdef __CUDACC__
#    define SKIPKERNELS_HOST_DEVICE __host__ __device__
#else
#    define SKIPKERNELS_HOST_DEVICE
#endif
