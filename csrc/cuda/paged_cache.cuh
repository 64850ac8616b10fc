// Where a position of a sequence stands in a layer's cache (num_blocks, kv heads, block_size, head_dim).
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

class PagedCache {
  public:
    template <class Op>
    __device__ explicit PagedCache(const Op& op)
        : PagedCache(op.block_table, op.blocks_per_sequence, op.num_key_value_heads, op.block_size) {}

    // The row of head_dim elements. The table is the host's: no kernel writes it.
    __device__ int row(int sequence, int position, int kv_head) const {
        const int block = block_table_[sequence * blocks_per_sequence_ + (position >> shift_)];
        return ((block * num_key_value_heads_ + kv_head) << shift_) + (position & mask());
    }
    // Positions from this one to the end of its block: the rows behind row().
    __device__ int left_in_block(int position) const { return mask() + 1 - (position & mask()); }

  private:
    __device__ PagedCache(const int32_t* block_table, int64_t blocks_per_sequence, int64_t num_key_value_heads,
                          int64_t block_size)
        : block_table_(block_table),
          blocks_per_sequence_(blocks_per_sequence),
          num_key_value_heads_(static_cast<int>(num_key_value_heads)) {
        shift_ = __ffs(static_cast<int>(block_size)) - 1;
    }
    __device__ int mask() const { return (1 << shift_) - 1; }

    const int32_t* block_table_;
    int64_t blocks_per_sequence_;
    int num_key_value_heads_, shift_;  // block_size is a power of two
};

}  // namespace skipkernels::cuda
