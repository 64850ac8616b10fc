// What the executor knows of an op on the CPU: how many independent tasks it has, and how a thread runs a range of
// them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../program.h"

namespace skipkernels::cpu {

constexpr int kMaxBatch = 16;
constexpr int kMaxVecWidth = 16;
constexpr int kPanelRows = 24;  // weight rows computed together; divisible by every register tile's height
constexpr int kMaxTile = 8;     // batch rows in one register tile

// A thread's private memory, and the instruction's rows.
struct Scratch {
    float* x;             // packed activations, see pack.h
    float* accumulators;  // [kPanelRows][kMaxTile][kMaxVecWidth], the panel between two blocks of k
    float* panel;         // [2][kMaxBatch][kPanelRows], results of up to two panels
    float* head;          // op-specific floats: a head's outputs, attention scores
    int rows[kMaxBatch];  // the rows with when != 0
    int num_rows;
    std::atomic<int32_t>* arrivals;  // shared by all threads: one zeroed counter per (batch row, key/value head)
};

struct Kernel {
    int64_t (*num_tasks)(const Instruction&);       // 0 or 1: run by one thread, in passing
    void (*prepare)(const Instruction&, Scratch&);  // a thread's own prologue, before its first task
    void (*run)(const Instruction&, int64_t begin, int64_t end, Scratch&);  // tasks [begin, end)
};

struct KernelSet {
    const char* isa;
    Kernel kernels[sizeof(kInstructionSet) / sizeof(kInstructionSet[0])];  // indexed by OpCode
    uint64_t (*read_bytes)(const char* data, size_t bytes);                // reads all, for the bandwidth probe
};

const KernelSet& generic_kernels();
#if SKIPKERNELS_HAVE_AVX2
const KernelSet& avx2_kernels();
#endif
#if SKIPKERNELS_HAVE_AVX512
const KernelSet& avx512_kernels();
#endif

// static for the reason given in numbers.h
static inline int count_rows(const Instruction& ins) {
    int count = 0;
    for (int64_t row = 0; row < ins.batch_size; ++row) count += ins.when[row] != 0;
    return count;
}

static inline void find_rows(const Instruction& ins, Scratch& scratch) {
    scratch.num_rows = 0;
    for (int64_t row = 0; row < ins.batch_size; ++row) {
        if (ins.when[row]) scratch.rows[scratch.num_rows++] = static_cast<int>(row);
    }
}

// Ops without vector code, compiled once.
#define SKIPKERNELS_PLAIN_KERNEL(op)                 \
    int64_t op##_tasks(const Instruction&);          \
    void op##_prepare(const Instruction&, Scratch&); \
    void op##_run(const Instruction&, int64_t begin, int64_t end, Scratch&);
SKIPKERNELS_PLAIN_KERNEL(embed)
SKIPKERNELS_PLAIN_KERNEL(skip_gate)
SKIPKERNELS_PLAIN_KERNEL(sample)
SKIPKERNELS_PLAIN_KERNEL(advance)
#undef SKIPKERNELS_PLAIN_KERNEL

}  // namespace skipkernels::cpu
