// The body of an isa_*.cpp: every op with vector code, compiled for one instruction set and gathered, with the plain
// ones, into its KernelSet. What these files share with others must be static or in the instruction set's namespace,
// and no template of the standard library may be left un-inlined: the linker keeps one copy of those, possibly one that
// this processor cannot run.
#include "branch_add.cpp"
#include "decode_attention.cpp"
#include "down_proj_add.cpp"
#include "down_proj_neurons_add.cpp"
#include "experts_down_proj_add.cpp"
#include "experts_down_proj_neurons_add.cpp"
#include "experts_gate_up_act.cpp"
#include "gate_proj_act.cpp"
#include "gate_up_act.cpp"
#include "lm_head.cpp"
#include "norm_rope_append.cpp"
#include "o_proj_add.cpp"
#include "qkv_rope_append.cpp"
#include "route_experts.cpp"
#include "select_neurons.cpp"
#include "up_proj_mul.cpp"

namespace skipkernels::SKIPKERNELS_ISA {

using namespace cpu;

inline uint64_t read_bytes(const char* data, size_t bytes) {
    Vec sums[8];
    for (Vec& sum : sums) sum = splat(0.0f);
    constexpr size_t kStep = sizeof(sums);
    for (size_t i = 0; i + kStep <= bytes; i += kStep) {
        for (int j = 0; j < 8; ++j) sums[j] = sums[j] + load(reinterpret_cast<const float*>(data + i) + j * Vec::width);
    }
    for (int j = 1; j < 8; ++j) sums[0] = sums[0] + sums[j];
    return float_to_bits(reduce_add(sums[0]));
}

#define SKIPKERNELS_KERNEL(op, Struct, FIELDS) cpu::Kernel{op##_tasks, op##_pack, op##_run},
inline constexpr cpu::KernelSet kKernels{
    SKIPKERNELS_ISA_NAME, {SKIPKERNELS_OPS(SKIPKERNELS_KERNEL)}, num_tiles, read_bytes};
#undef SKIPKERNELS_KERNEL

}  // namespace skipkernels::SKIPKERNELS_ISA
