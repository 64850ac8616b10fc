// Every op for avx2.
#define SKIPKERNELS_ISA_AVX2
#define SKIPKERNELS_ISA avx2
#define SKIPKERNELS_ISA_NAME "avx2"
#include "kernel_set.h"

namespace skipkernels::cpu {
const KernelSet& avx2_kernels() { return avx2::kKernels; }
}  // namespace skipkernels::cpu
