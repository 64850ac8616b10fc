// Where a position of a sequence stands in a layer's cache (num_blocks, kv heads, block_size, head_dim).
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

class PagedCache {
  public:
    // On the host; block_size is a power of two.
    template <class Op>
    explicit PagedCache(const Op& op)
        : block_table_(op.block_table),
          blocks_per_sequence_(static_cast<int>(op.blocks_per_sequence)),
          num_key_value_heads_(static_cast<int>(op.num_key_value_heads)) {
        while (1 << shift_ < op.block_size) ++shift_;
    }

    // The row of head_dim elements. The table is the host's: no kernel writes it.
    __device__ int row(int sequence, int position, int kv_head) const {
        const int block = block_table_[int64_t{sequence} * blocks_per_sequence_ + (position >> shift_)];
        return ((block * num_key_value_heads_ + kv_head) << shift_) + (position & mask());
    }
    // Positions from this one to the end of its block: their rows follow each other.
    __device__ int left_in_block(int position) const { return mask() + 1 - (position & mask()); }

  private:
    __device__ int mask() const { return (1 << shift_) - 1; }

    const int32_t* block_table_;
    int blocks_per_sequence_, num_key_value_heads_, shift_ = 0;
};

}  // namespace skipkernels::cuda
