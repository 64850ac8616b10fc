// y = w x on the CUDA cores, one batch row after the other.
//
// Four warps read the first run of a tile, four the second. Of these 128 threads, thread i owns columns
// [i V, (i + 1) V) of every chunk of 128 V columns: a warp reads 512 neighbouring bytes of a row, and V values of x
// serve 8 weight rows. Two chunks are under way. A chunk of 4 KB of a warp takes it some 200 instructions, and an H200
// 1,800 cycles to deliver to all 8 warps.
#pragma once

#include "linear.cuh"

namespace skipkernels::cuda {

constexpr int kRunWarps = kLinearWarps / 2;
constexpr int kWarpSums = kRunRows + 1;  // what a warp leaves: its run's sums, and that of the squares
constexpr size_t kRowsSharedBytes = kSumsAt + 2 * kLinearWarps * kWarpSums * sizeof(float);

// Sums of 8 values over the lanes of a warp; lane l gets that of value l / 4. Each of the first steps halves the values
// a lane keeps: 9 shuffles instead of 40.
__device__ __forceinline__ float sum_each_of_8(float (&value)[8]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int step = 0; step < 3; ++step) {
        const int lanes = 16 >> step, kept = 4 >> step;
        const bool upper = lane & lanes;
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            const float keep = upper ? value[i + kept] : value[i], give = upper ? value[i] : value[i + kept];
            value[i] = keep + __shfl_xor_sync(kAllLanes, give, lanes);
        }
    }
    value[0] += __shfl_xor_sync(kAllLanes, value[0], 2);
    return value[0] + __shfl_xor_sync(kAllLanes, value[0], 1);
}

// V: columns of one load, 16 bytes of them or 1.
template <class T, int V, class Epilogue>
__device__ __forceinline__ void linear_rows(const Linear<T>& in, const Epilogue& epilogue, Rows& rows,
                                            const Clock& clock) {
    constexpr int kStages = kCopies / kRunRows, kChunk = kRunWarps * 32 * V;
    constexpr bool kCopied = V > 1;  // else weights are read where they are used
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int run = warp / kRunWarps, first_k = thread % (kRunWarps * 32) * V;
    const int grid = in.blocks, count = rows.count();

    // The copies run ahead by kStages chunks, also into the next tile.
    auto* ring = reinterpret_cast<uint4*>(ptx::shared_memory()) + thread;
    int index_ahead = static_cast<int>(blockIdx.x), n_ahead = 0, k_ahead = first_k;
    RunRows<T> rows_ahead(in, epilogue.tile(index_ahead), run);
    auto copy_chunk = [&](int stage) {
        const T* from = rows_ahead.first + k_ahead;
#pragma unroll
        for (int r = 0; r < kRunRows; ++r) {
            if (k_ahead < in.k)
                ptx::copy_weights_async(ring + (stage * kRunRows + r) * kLinearThreads, from, in.cache_policy);
            from += r < rows_ahead.last ? in.k : 0;
        }
        ptx::commit_copies();
        k_ahead += kChunk;
        if (k_ahead - first_k < in.k) return;
        const bool same_tile = ++n_ahead < count;
        if (!same_tile) n_ahead = 0, index_ahead += grid;
        k_ahead = same_tile || index_ahead < in.tiles ? first_k : in.k;  // in.k: nothing is left
        if (!same_tile && index_ahead < in.tiles) rows_ahead = RunRows<T>(in, epilogue.tile(index_ahead), run);
    };
    for (int s = 0; kCopied && s < kStages; ++s) copy_chunk(s);
    for (int k = first_k; kCopied && k < in.k; k += kChunk) touch_norm<Epilogue::kNormed>(in, k);
    if (in.touches_settled && in.when_is_settled && thread < kTileRows) {
        epilogue.touch(static_cast<int>(blockIdx.x), rows.at(0), thread);
    }

    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();

    int stage = 0, turn = 0;
    for (int index = static_cast<int>(blockIdx.x); index < in.tiles; index += grid) {
        const RunRows<T> run_rows(in, epilogue.tile(index), run);
        for (int n = 0; n < count; ++n, ++turn) {
            const int row = rows.at(n);
            const float* x = in.x + static_cast<int64_t>(row) * in.k;
            // one warp finishes a tile while the others go on; each in turn, so that none falls behind
            const bool finishes = warp == turn % kLinearWarps;
            const int result_row = finishes && lane < kTileRows ? row : -1;
            typename Epilogue::Early early{};
            if (result_row >= 0) early = epilogue.early(index, row, lane);

            float sum[kRunRows] = {}, squares = 0.0f;
            for (int k = first_k; k - first_k < in.k; k += kChunk) {
                uint4 w[kRunRows];
                if constexpr (kCopied) {
                    ptx::wait_copies<kStages - 1>();
#pragma unroll
                    for (int r = 0; r < kRunRows; ++r) w[r] = ring[(stage * kRunRows + r) * kLinearThreads];
                    copy_chunk(stage);
                    stage = (stage + 1) % kStages;
                }
                if (k >= in.k) continue;
                float xs[V];
                load_x<Epilogue::kNormed>(in, x, k, xs, squares);
#pragma unroll
                for (int r = 0; r < kRunRows; ++r) {
                    if constexpr (kCopied) {
#pragma unroll
                        for (int i = 0; i < V; ++i) sum[r] = fmaf(element<T>(w[r], i), xs[i], sum[r]);
                    } else {
                        const T* at = run_rows.first + static_cast<int64_t>(min(r, run_rows.last)) * in.k + k;
                        sum[r] = fmaf(to_float(*at), xs[0], sum[r]);
                    }
                }
            }

            // [turn % 2][warp][kWarpSums]: with two buffers one barrier a tile is enough
            float* shared = reinterpret_cast<float*>(ptx::shared_memory() + kSumsAt);
            shared += turn % 2 * kLinearWarps * kWarpSums;
            const float total = sum_each_of_8(sum);
            if (lane % 4 == 0) shared[warp * kWarpSums + lane / 4] = total;
            if constexpr (Epilogue::kNormed) {
                squares = warp_sum(squares);
                if (lane == 0) shared[warp * kWarpSums + kRunRows] = squares;
            }
            __syncthreads();
            if (finishes) {
                const int r = lane % kTileRows;
                const float* of_run = shared + r / kRunRows * kRunWarps * kWarpSums;
                float result = 0.0f, all_squares = 0.0f;
#pragma unroll
                for (int i = 0; i < kRunWarps; ++i) {
                    result += of_run[i * kWarpSums + r % kRunRows];
                    if constexpr (Epilogue::kNormed) all_squares += of_run[i * kWarpSums + kRunRows];
                }
                if constexpr (Epilogue::kNormed) result *= norm_scale(in, all_squares);
                epilogue(index, result_row, r, result, early);
            }
        }
        if constexpr (Epilogue::kFinishesTiles) epilogue.finish_tile(index, rows);
    }
}

}  // namespace skipkernels::cuda
