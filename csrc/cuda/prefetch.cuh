// Blocks that have nothing else to do bring the weights that come next into L2.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

constexpr uint32_t kPrefetchBytes = 1024;  // a thread's piece

// By `threads` threads, of which this one is number `thread`: they take pieces in turn.
__device__ __forceinline__ void prefetch(const Prefetch& next, int64_t thread, int64_t threads) {
    bool runs = false;
    for (int64_t row = 0; row < next.num_rows; ++row) runs |= ptx::load_relaxed(next.run_ffn + row) != 0;
    const WeightRange ranges[] = {next.always, runs ? next.if_run : next.otherwise};
    int64_t left = next.max_bytes;
    for (const WeightRange& range : ranges) {
        const int64_t bytes = min(range.bytes, left) / 16 * 16;
        left -= bytes;
        for (int64_t at = thread * kPrefetchBytes; at < bytes; at += threads * kPrefetchBytes) {
            ptx::prefetch_l2(static_cast<const char*>(range.data) + at,
                             static_cast<uint32_t>(min(int64_t{kPrefetchBytes}, bytes - at)));
        }
    }
}

}  // namespace skipkernels::cuda
