// What the executor knows of an op on the CPU: how many independent tasks it has, and how a thread runs a range of
// them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../program.h"

namespace skipkernels::cpu {

constexpr int kMaxVecWidth = 16;
constexpr int kPanelRows = 24;         // weight rows computed together; divisible by every register tile's height
constexpr int kBlockPanels = 2;        // panels of a task where weights are quantised: three groups of 16 rows
constexpr int kMaxTile = 4;            // rows in one register tile
constexpr int kTilesTogether = 4;      // at most, that take turns in every block of k
constexpr int kFewRows = 8;            // that each thread packs for itself; more are packed once for all threads
constexpr int kAttentionQueries = 64;  // query heads of a tile of rows that share one read of keys and values
constexpr int kNeuronStep = 32;        // columns: a multiple of every step over the rows of a transposed matrix
constexpr int kNeuronPanel = 96;       // columns computed together, of whole steps and of whole panels
constexpr int kNeuronsAhead = 32;      // of the chunk after the one at hand, whose rows are fetched
constexpr int kHiddenStep = 64;        // columns of neuron_sums come in steps of so many
constexpr int kColumnsPanel = 384;     // the same as kNeuronPanel where weights are quantised, of whole pairs of chunks
constexpr int kAttentionBlock = 64;    // most positions whose keys and values are arranged together

struct Positions {
    int64_t begin, end;
};

// A query head of a row, in one split of its positions, which count from the split's first.
struct AttentionQuery {
    Positions range;
    float* partials;  // max, sum, output (head_dim)
};

// Neighbouring rows of one sequence: how decode_attention cuts the list of rows.
struct RowTiles {
    int* begins;  // of each, in the list, and the list's end
    int count;
    int64_t most_splits;
};

// What decode_attention needs of a Scratch.
struct AttentionScratch {
    RowTiles* tiles;                 // shared by all threads, written by num_tasks
    std::atomic<int32_t>* arrivals;  // shared by all threads: a zeroed counter per (tile, key/value head)
    AttentionQuery* queries;
    float* packed_queries;  // (queries, head_dim, padded)
    float* scores;          // (queries, scores_stride), then the weights
    int64_t scores_stride;
    float* outputs;   // (queries, head_dim, padded)
    float* arranged;  // keys (head_dim, kAttentionBlock) or values (kAttentionBlock, head_dim, padded)
};

// A thread's memory, and the rows of the instruction at hand. How much each pointer holds is counted in executor.cpp.
struct Scratch {
    float* x;             // packed activations, see pack.h: own_x, or shared_x where there are many rows
    float* own_x;         // few rows, packed by each thread for itself
    float* shared_x;      // many rows, packed once for all threads
    float* accumulators;  // [kTilesTogether][kPanelRows][kMaxTile][kMaxVecWidth], the panel between two blocks of k
    float* panel;         // [kBlockPanels][num_rows][kPanelRows], the panels' results
    float* second_panel;  // another, for ops that combine two
    float* op_scratch;    // what an op wants for itself; qkv_rope_append: (num_rows, head_dim), a head's outputs
    uint8_t* group;       // quantised rows that lay apart, side by side
    float* neuron_sums;   // shared by all threads; down_proj_neurons_add: (chunks, rows, padded hidden), of few rows
    const int* rows;      // the rows with row_mask != 0, one list for all threads
    int num_rows;
    AttentionScratch attention;
};

// The rows of an instruction stand in the scratch before any of these is called.
struct Kernel {
    int64_t (*num_tasks)(const Instruction&, const Scratch&);               // 0 or 1: run by one thread, in passing
    void (*pack)(const Instruction&, int begin, int end, Scratch&);         // tiles [begin, end) into x; null: none
    void (*run)(const Instruction&, int64_t begin, int64_t end, Scratch&);  // tasks [begin, end), all of x packed
};

struct KernelSet {
    const char* isa;
    Kernel kernels[sizeof(kInstructionSet) / sizeof(kInstructionSet[0])];  // indexed by OpCode
    int (*num_tiles)(int num_rows);                                        // that many rows are packed in
    uint64_t (*read_bytes)(const char* data, size_t bytes);                // reads all, for the bandwidth probe
};

// One for each instruction set; setup.py decides which are compiled in.
const KernelSet& generic_kernels();
const KernelSet& avx2_kernels();
const KernelSet& avx_vnni_kernels();
const KernelSet& avx512_kernels();
const KernelSet& avx512_vnni_kernels();
const KernelSet& avx512_bf16_kernels();

// Ops without vector code, compiled once.
#define SKIPKERNELS_PLAIN_KERNEL(op)                                         \
    constexpr auto op##_pack = static_cast<decltype(Kernel::pack)>(nullptr); \
    int64_t op##_tasks(const Instruction&, const Scratch&);                  \
    void op##_run(const Instruction&, int64_t begin, int64_t end, Scratch&);
SKIPKERNELS_PLAIN_KERNEL(embed)
SKIPKERNELS_PLAIN_KERNEL(skip_gate)
SKIPKERNELS_PLAIN_KERNEL(neuron_gate)
SKIPKERNELS_PLAIN_KERNEL(sample)
SKIPKERNELS_PLAIN_KERNEL(advance)
#undef SKIPKERNELS_PLAIN_KERNEL

}  // namespace skipkernels::cpu
