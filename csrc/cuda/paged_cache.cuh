// Where a position of a sequence stands in a layer's cache (num_blocks, kv heads, block_size, head_dim).
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

struct PagedCache {
    const int32_t* block_table;
    int64_t blocks_per_sequence;
    int num_key_value_heads, block_shift;  // block_size is a power of two

    template <class Op>
    __device__ explicit PagedCache(const Op& op)
        : block_table(op.block_table),
          blocks_per_sequence(op.blocks_per_sequence),
          num_key_value_heads(static_cast<int>(op.num_key_value_heads)),
          block_shift(__ffs(static_cast<int>(op.block_size)) - 1) {}

    __device__ int block_size() const { return 1 << block_shift; }
    // Positions from this one to the end of its block.
    __device__ int left_in_block(int position) const { return block_size() - (position & (block_size() - 1)); }
    // The row of head_dim elements; positions of the same block are neighbours. Of a table that only the host writes.
    __device__ int64_t row(int sequence, int position, int kv_head) const {
        const int block = block_table[sequence * blocks_per_sequence + (position >> block_shift)];
        return ((int64_t{block} * num_key_value_heads + kv_head) << block_shift) + (position & (block_size() - 1));
    }
};

}  // namespace skipkernels::cuda
