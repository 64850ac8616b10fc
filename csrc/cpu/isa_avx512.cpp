// Every op for avx512.
#define SKIPKERNELS_ISA_AVX512
#define SKIPKERNELS_ISA avx512
#define SKIPKERNELS_ISA_NAME "avx512"
#include "kernel_set.h"

namespace skipkernels::cpu {
const KernelSet& avx512_kernels() { return avx512::kKernels; }
}  // namespace skipkernels::cpu
