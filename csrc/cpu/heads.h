// One head of q, k or v of a row, on its way from a projection to attention.
#pragma once

#include "pack.h"
#include "paged_cache.h"

namespace skipkernels::SKIPKERNELS_ISA {

// x (head_dim) in place: channels (i, i + pairs) rotated by the angles at one position, those from 2 pairs on left
inline void rotate(float* x, const float* cos, const float* sin, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
        const float first = x[i], second = x[i + pairs];
        x[i] = first * cos[i] - second * sin[i];
        x[i + pairs] = second * cos[i] + first * sin[i];
    }
}

// x (head_dim) -> query or a cache, at the row's position; heads of q come first, then k's and v's
template <class T, class Op>
inline void store_head(const Op& op, int64_t head, int row, const float* x) {
    const int64_t heads = op.num_attention_heads, kv_heads = op.num_key_value_heads, d = op.head_dim;
    if (head < heads) {
        std::memcpy(op.query + (row * heads + head) * d, x, d * sizeof(float));
        return;
    }
    const PagedCache cache(op, op.row_sequence[row]);
    T* at = static_cast<T*>(head < heads + kv_heads ? op.k_cache : op.v_cache) +
            cache.offset((head - heads) % kv_heads, op.row_position[row]);
    for (int64_t i = 0; i < d; ++i) store_as(at + i, x[i]);
}

}  // namespace skipkernels::SKIPKERNELS_ISA
