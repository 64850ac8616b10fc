// Every op for avx_vnni: AVX2 with dot products of bytes.
#define SKIPKERNELS_ISA_AVX2
#define SKIPKERNELS_ISA_VNNI
#define SKIPKERNELS_ISA avx_vnni
#define SKIPKERNELS_ISA_NAME "avx_vnni"
#include "kernel_set.h"

namespace skipkernels::cpu {
const KernelSet& avx_vnni_kernels() { return avx_vnni::kKernels; }
}  // namespace skipkernels::cpu
