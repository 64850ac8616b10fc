// Every op for avx512_vnni.
#define SKIPKERNELS_ISA_AVX512
#define SKIPKERNELS_ISA_VNNI
#define SKIPKERNELS_ISA avx512_vnni
#define SKIPKERNELS_ISA_NAME "avx512_vnni"
#include "kernel_set.h"

namespace skipkernels::cpu {
const KernelSet& avx512_vnni_kernels() { return avx512_vnni::kKernels; }
}  // namespace skipkernels::cpu
