// Every op for generic.
#define SKIPKERNELS_ISA generic
#define SKIPKERNELS_ISA_NAME "generic"
#include "kernel_set.h"

namespace skipkernels::cpu {
const KernelSet& generic_kernels() { return generic::kKernels; }
}  // namespace skipkernels::cpu
