// Where a position of a sequence stands in a paged cache (blocks, kv_heads, block_size, head_dim).
#pragma once

#include <cstdint>

namespace skipkernels::SKIPKERNELS_ISA {

struct PagedCache {
    const int32_t* blocks;  // of the sequence
    int64_t kv_heads, block_size, head_dim;

    template <class Op>
    PagedCache(const Op& op, int64_t sequence)
        : blocks(op.block_table + sequence * op.blocks_per_sequence),
          kv_heads(op.num_key_value_heads),
          block_size(op.block_size),
          head_dim(op.head_dim) {}

    int64_t offset(int64_t kv_head, int64_t position) const {
        const int64_t block = blocks[position / block_size];
        return ((block * kv_heads + kv_head) * block_size + position % block_size) * head_dim;
    }
};

}  // namespace skipkernels::SKIPKERNELS_ISA
