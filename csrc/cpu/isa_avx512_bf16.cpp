// Every op for avx512_bf16; every processor with it has VNNI.
#define SKIPKERNELS_ISA_AVX512
#define SKIPKERNELS_ISA_AVX512_BF16
#define SKIPKERNELS_ISA_VNNI
#define SKIPKERNELS_ISA avx512_bf16
#define SKIPKERNELS_ISA_NAME "avx512_bf16"
#include "kernel_set.h"

namespace skipkernels::cpu {
const KernelSet& avx512_bf16_kernels() { return avx512_bf16::kKernels; }
}  // namespace skipkernels::cpu
