// The kernel under every projection: y (rows, m) = w (m, k) x (rows, k) of 1 to 16 batch rows at a time, where x may be
// the rms_norm of what is given and an epilogue decides which weight rows go together and what becomes of y.
//
// A decode step is bound by the one read of the weights. On an H200 4.3 TB/s at a latency of about 0.8 us means 3.4 MB
// in flight, 26 KB per SM. So:
//   - One persistent block of 256 threads per SM walks its tiles of 16 weight rows. In a tile every thread owns its own
//     columns k, and copies the weights there into its own slots of shared memory, 64 KB ahead of their use: as soon as
//     a slot was read it is filled again, also across the end of a tile. No barrier is needed for that.
//   - A block takes half of an SM's registers and shared memory or less: the following kernel's block waits beside it,
//     with its first 64 KB of weights already loaded.
//   - A thread needs x at its own columns only, so x never passes through shared memory: it is read where it is used,
//   in
//     fp32, from L1, which the weights bypass. The norm costs no pass of its own: the weight of the
//     norm is applied on the way, the scale 1 / sqrt(mean(x^2) + eps) to the finished sums.
//   - Sums are added in an order that depends on nothing but k: the same bits every run, on any number of SMs.
//
// One row is computed on the CUDA cores (linear_rows.cuh), 2 to 16 on the tensor cores with the weights as the
// 16-row operand (linear_mma.cuh). fp32 weights, and rows that 16-byte loads cannot read, take the first way for any
// number of rows, a row after the other.
//
// An epilogue has
//   kNormed                      whether x is to be normed
//   Tile tile(index)             which weight rows are a tile
//   Early early(index, row, r)   what it will need of memory for batch row `row` and row r of the tile, asked for
//                                before the sums are there
//   touch(index, row, r)         brings near what of that is settled, before the wait
//   (index, row, r, value, early)  takes y. Called by whole warps: lanes 0..15 and lanes 16..31 each hold the 16 values
//                                of a tile for one batch row, or row = -1 and nothing
//   kFinishesTiles, finish_tile(index, rows)   called by all threads behind a tile
//   kHasExtraBlock, extra_block(row_mask)   what a block beside those of the tiles does, if it is launched
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

constexpr int kLinearThreads = 256;
constexpr int kLinearWarps = kLinearThreads / 32;
constexpr int kTileRows = 16;
constexpr int kRunRows = kTileRows / 2;

// Copies of 16 bytes that each thread has under way.
constexpr int kCopies = 16;
constexpr size_t kRingBytes = kCopies * kLinearThreads * sizeof(uint4);

// Up to kRowsOfPass of the rows whose `row_mask` is set, which a pass over the weights takes together. In shared
// memory: all registers are needed elsewhere.
struct alignas(16) Rows {
    int row[kRowsOfPass];  // in order, -1 behind the last
    int found;
    int end;   // the rows from here on are left to the next pass
    int flag;  // for the epilogue

    // Those from `first` on. By one warp.
    __device__ void find(const int32_t* row_mask, int num_rows, int first) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        if (lane < kRowsOfPass) row[lane] = -1;
        __syncwarp();
        int next = first, taken = 0;
        while (next < num_rows && taken < kRowsOfPass) {
            const int own = next + lane;
            const bool wanted = own < num_rows && ptx::load_relaxed(row_mask + own) != 0;
            const uint32_t set = __ballot_sync(kAllLanes, wanted);
            const int number = taken + __popc(set & ((uint32_t{1} << lane) - 1));
            if (wanted && number < kRowsOfPass) row[number] = own;
            const uint32_t left = __ballot_sync(kAllLanes, wanted && number >= kRowsOfPass);
            next += left ? __ffs(static_cast<int>(left)) - 1 : 32;
            taken = min(taken + __popc(set), kRowsOfPass);
        }
        if (lane == 0) found = taken, end = min(next, num_rows);
    }
    __device__ int count() const { return found; }
    __device__ int at(int n) const { return row[n]; }
};

// Shared memory: the ring, the rows, the sums that warps leave for each other.
constexpr size_t kSumsAt = kRingBytes + sizeof(Rows);
__device__ __forceinline__ Rows& rows_of_pass() { return *reinterpret_cast<Rows*>(ptx::shared_memory() + kRingBytes); }

// The weight rows of a tile: two runs of up to 8 neighbours. Which ones is the epilogue's choice: channels i and
// i + head_dim / 2 for a rotation, gate and up for an activation, 16 neighbours otherwise.
struct Tile {
    int64_t first[2];  // a row that exists, also of a run that is empty
    int count[2];

    __device__ bool has(int r) const { return r % kRunRows < (r < kRunRows ? count[0] : count[1]); }
};

// Tile `index` of m rows in their order.
__device__ __forceinline__ Tile tile_of_neighbours(int index, int64_t m) {
    const int64_t first = int64_t{index} * kTileRows;
    const int left = static_cast<int>(min(int64_t{kTileRows}, m - first));
    return {{first, left > kRunRows ? first + kRunRows : first}, {min(left, kRunRows), max(left - kRunRows, 0)}};
}

template <class T>
struct Linear {
    const T* w;
    const float* x;     // (num_rows, k)
    const float* norm;  // (k), the weight of an rms_norm of x; not looked at unless Epilogue::kNormed
    float eps;
    const int32_t* row_mask;
    bool when_is_settled;
    int num_rows;
    int k;
    int tiles;
    int blocks;  // that take the tiles in turn
    bool triggers_early, touches_settled;
    uint64_t cache_policy;  // of the weights
    Stamps stamps;
};

// Where the weights of a run begin, and its last row, which stands in for those behind it: nobody uses their results.
template <class T>
struct RunRows {
    const T* first;
    int last;

    __device__ RunRows(const Linear<T>& in, const Tile& tile, bool second)
        : first(in.w + (second ? tile.first[1] : tile.first[0]) * in.k),
          last(max((second ? tile.count[1] : tile.count[0]) - 1, 0)) {}
};

// Columns [k, k + V) of a row of x, times those of the norm; adds x^2 to `squares`.
template <bool kNormed, class T, int V>
__device__ __forceinline__ void load_x(const Linear<T>& in, const float* row, int k, float (&x)[V], float& squares) {
    load_floats(row + k, x);
    if constexpr (!kNormed) return;
    float norm[V];
    load_floats(in.norm + k, norm);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        squares = fmaf(x[i], x[i], squares);
        x[i] *= norm[i];
    }
}

// Brings columns [k, k + 8) of the norm near.
template <bool kNormed, class T>
__device__ __forceinline__ void touch_norm(const Linear<T>& in, int k) {
    if (kNormed && in.touches_settled && k < in.k) ptx::touch(in.norm + k);
}

template <class T>
__device__ __forceinline__ float norm_scale(const Linear<T>& in, float squares) {
    return 1.0f / sqrtf(squares / static_cast<float>(in.k) + in.eps);
}

}  // namespace skipkernels::cuda
