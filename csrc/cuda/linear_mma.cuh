// y = w x on the tensor cores, for up to 8 (kColumnTiles = 1) or 16 batch rows together.
//
// The weights are the 16-row operand of mma.m16n8k16 and enter it as they are stored: lane 4 g + t has 8 neighbouring k
// of rows g and g + 8, and since a sum does not care about the order of k, the first four of them serve as the lane's
// columns of one mma and the last four of the next. x is the other operand, with the same order of k.
//
// The tensor cores have time to spare: 1 KB of weights (16 rows of 32 k) arrives every 55 cycles on an H200 and needs 6
// or 12 mma of about 2 cycles. It is spent on accuracy: x enters as the sum of three bf16, which is all 24 bits of a
// float. fp16 has not the range to do the same, so fp16 weights become tf32, which holds them exactly, and x the sum of
// two tf32. Tensor cores truncate where they add, so only 32 k are summed there, and these sums are added as floats.
#pragma once

#include "linear.cuh"

namespace skipkernels::cuda {

constexpr int kBlockK = 32;  // k that the four lanes of a group load together

// x at the lane's 8 columns, split for the tensor cores, and the product with the weights there.
template <class T>
struct MmaOperand;

// Floats as sums of three bf16, two in a register.
template <int kPairs>
struct Bf16Parts {
    static constexpr int kParts = 3;
    uint32_t part[kParts][kPairs];  // largest first

    __device__ explicit Bf16Parts(const float (&x)[2 * kPairs]) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            float low = x[2 * i], high = x[2 * i + 1];
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                part[p][i] = ptx::floats_to_bf16(low, high);
                low -= __uint_as_float(part[p][i] << 16), high -= __uint_as_float(part[p][i] & 0xffff0000u);
            }
        }
    }
};

template <>
struct MmaOperand<bf16> : Bf16Parts<4> {
    using Bf16Parts<4>::Bf16Parts;

    // sum (16, 8) += w (16, 32) x (32, 8); `w` holds the lane's 8 weights of row g and of row g + 8.
    __device__ void multiply_add(float (&sum)[4], const uint4 (&w)[2]) const {
        const uint32_t first[4] = {w[0].x, w[1].x, w[0].y, w[1].y}, second[4] = {w[0].z, w[1].z, w[0].w, w[1].w};
        float d[4] = {};
#pragma unroll
        for (int p = kParts - 1; p >= 0; --p) {
            ptx::mma_bf16_m16n8k16(d, first, {part[p][0], part[p][1]});
            ptx::mma_bf16_m16n8k16(d, second, {part[p][2], part[p][3]});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += d[i];
    }
};

template <>
struct MmaOperand<fp16> {
    static constexpr int kParts = 2;
    uint32_t part[kParts][8];

    __device__ explicit MmaOperand(const float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            part[0][i] = __float_as_uint(x[i]) & 0xffffe000u;  // the bits that tf32 has
            part[1][i] = __float_as_uint(x[i] - __uint_as_float(part[0][i]));
        }
    }
    __device__ void multiply_add(float (&sum)[4], const uint4 (&w)[2]) const {
        float d[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const uint32_t a[4] = {__float_as_uint(element<fp16>(w[0], i)), __float_as_uint(element<fp16>(w[1], i)),
                                   __float_as_uint(element<fp16>(w[0], i + 1)),
                                   __float_as_uint(element<fp16>(w[1], i + 1))};
#pragma unroll
            for (int p = kParts - 1; p >= 0; --p) ptx::mma_tf32_m16n8k8(d, a, {part[p][i], part[p][i + 1]});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += d[i];
    }
};

// [warp]: sums [tile][row][column], then squares [column]. 2: results are read without bank conflicts.
template <int kColumnTiles, int kTiles>
struct MmaSums {
    static constexpr int kStride = 8 * kColumnTiles + 2, kSquares = kTiles * kTileRows * kStride;
    static constexpr int kWarpFloats = kSquares + 8 * kColumnTiles;
    static constexpr size_t kBytes = kLinearWarps * kWarpFloats * sizeof(float);
};

// In the epilogue a thread has one row of a tile and one batch row, or -1.
template <int kColumnTiles>
__device__ __forceinline__ int result_row(const Rows& rows) {
    const int thread = ptx::thread_index();
    return thread / kTileRows < 8 * kColumnTiles ? rows.at(thread / kTileRows) : -1;
}

// Asks for what the epilogue needs of the tiles from `index` on, of which there are some below `end`.
template <int kColumnTiles, int kTiles, class Epilogue>
__device__ __forceinline__ void early_of_tiles(const Epilogue& epilogue, const Rows& rows, int index, int end,
                                               typename Epilogue::Early (&early)[kTiles]) {
    const int row = result_row<kColumnTiles>(rows);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        if (row >= 0 && index + t < end) early[t] = epilogue.early(index + t, row, ptx::thread_index() % kTileRows);
    }
}

// Adds the warps' sums of the tiles from `index` on, in the order of the warps, and hands them to the epilogue.
template <int kColumnTiles, int kTiles, class T, class Epilogue>
__device__ __forceinline__ void finish_tiles(const Linear<T>& in, const Epilogue& epilogue, Rows& rows, int index,
                                             int end, const float (&sum)[kTiles][kColumnTiles][4],
                                             float (&squares)[kColumnTiles],
                                             const typename Epilogue::Early (&early)[kTiles]) {
    using Sums = MmaSums<kColumnTiles, kTiles>;
    const int thread = ptx::thread_index(), warp = thread / 32, lane = thread % 32;
    const int group = lane / 4, quad = lane % 4, result_column = thread / kTileRows;
    auto* shared = reinterpret_cast<float*>(ptx::shared_memory() + kSumsAt);
    float* own = shared + warp * Sums::kWarpFloats;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* to = own + (t * kTileRows + half * kRunRows + group) * Sums::kStride + c * 8 + quad * 2;
                to[0] = sum[t][c][half * 2], to[1] = sum[t][c][half * 2 + 1];
            }
        }
        if constexpr (Epilogue::kNormed) {
            squares[c] += __shfl_xor_sync(kAllLanes, squares[c], 1);
            squares[c] += __shfl_xor_sync(kAllLanes, squares[c], 2);
            if (quad == 0) own[Sums::kSquares + c * 8 + group] = squares[c];
        }
    }
    __syncthreads();
    if (warp * 2 < 8 * kColumnTiles) {
        float scale = 1.0f;
        if constexpr (Epilogue::kNormed) {
            float all_squares = 0.0f;
            for (int i = 0; i < kLinearWarps; ++i) {
                all_squares += shared[i * Sums::kWarpFloats + Sums::kSquares + result_column];
            }
            scale = norm_scale(in, all_squares);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            if (index + t >= end) break;
            const float* of_row = shared + (t * kTileRows + thread % kTileRows) * Sums::kStride + result_column;
            float result = 0.0f;
            for (int i = 0; i < kLinearWarps; ++i) result += of_row[i * Sums::kWarpFloats];
            epilogue(index + t, result_row<kColumnTiles>(rows), thread % kTileRows, result * scale, early[t]);
        }
    }
    __syncthreads();  // before the next sums are left there
    if constexpr (Epilogue::kFinishesTiles) {
        for (int t = 0; t < kTiles && index + t < end; ++t) epilogue.finish_tile(index + t, rows);
    }
}

// kTiles tiles are walked side by side and share one read of x: worth it where a block has several, and needed where
// the 16 rows of x are more bytes than the tile.
template <class T, int kColumnTiles, int kTiles, class Epilogue>
__device__ __forceinline__ void linear_mma(const Linear<T>& in, const Epilogue& epilogue, Rows& rows,
                                           const Clock& clock) {
    constexpr int kBlocks = 2 / kTiles;  // a stage is kBlocks blocks of k of kTiles tiles: 4 copies
    constexpr int kStageCopies = 2 * kTiles * kBlocks, kStages = kCopies / kStageCopies;
    constexpr int kStageK = kLinearWarps * kBlocks * kBlockK;  // columns of all warps
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int group = lane / 4, quad = lane % 4, grid = in.blocks;
    const int groups = static_cast<int>(ceil_div(in.tiles, kTiles)), first_k = warp * kBlocks * kBlockK + quad * 8;

    // The copies run ahead by kStages stages, also into the next tiles.
    auto* ring = reinterpret_cast<uint4*>(ptx::shared_memory()) + thread;
    auto slot = [&](int stage, int tile, int block, int run) -> uint4& {
        return ring[(stage * kStageCopies + (tile * kBlocks + block) * 2 + run) * kLinearThreads];
    };
    uint32_t lane_rows[kTiles][2];  // where they begin, in loads
    int group_ahead = static_cast<int>(blockIdx.x), k_ahead = 0;
    auto find_rows = [&] {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const Tile tile = epilogue.tile(min(group_ahead * kTiles + t, in.tiles - 1));
#pragma unroll
            for (int run = 0; run < 2; ++run) {
                const RunRows<T> run_rows(in, tile, run);
                const T* from = run_rows.first + static_cast<int64_t>(min(group, run_rows.last)) * in.k + first_k;
                lane_rows[t][run] = static_cast<uint32_t>((from - in.w) / kVector<T>);
            }
        }
    };
    auto copy_stage = [&](int stage) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                if (group_ahead * kTiles + t >= in.tiles || first_k + k_ahead + b * kBlockK >= in.k) continue;
#pragma unroll
                for (int run = 0; run < 2; ++run) {
                    ptx::copy_weights_async(
                        &slot(stage, t, b, run),
                        in.w + static_cast<int64_t>(lane_rows[t][run]) * kVector<T> + k_ahead + b * kBlockK,
                        in.cache_policy);
                }
            }
        }
        ptx::commit_copies();
        k_ahead += kStageK;
        if (k_ahead < in.k) return;
        k_ahead = 0, group_ahead += grid;
        if (group_ahead < groups) find_rows();
    };
    find_rows();
    for (int s = 0; s < kStages; ++s) copy_stage(s);

    int x[kColumnTiles];  // the lane's column of each operand is a batch row, which begins at this element; or -1
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
        const int row = rows.at(c * 8 + group);
        x[c] = row >= 0 ? row * in.k : -1;
    }
    if constexpr (kColumnTiles == 1) {  // with more, registers would not do
        for (int k = first_k; k < in.k; k += kStageK) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) touch_norm<Epilogue::kNormed>(in, k + b * kBlockK);
        }
        const int row = result_row<kColumnTiles>(rows);
        if (in.touches_settled && in.when_is_settled && row >= 0) {
            epilogue.touch(static_cast<int>(blockIdx.x) * kTiles, row, thread % kTileRows);
        }
    }
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();

    int stage = 0;
    for (int at = static_cast<int>(blockIdx.x); at < groups; at += grid) {
        typename Epilogue::Early early[kTiles] = {};
        float sum[kTiles][kColumnTiles][4] = {}, squares[kColumnTiles] = {};
        early_of_tiles<kColumnTiles>(epilogue, rows, at * kTiles, in.tiles, early);
        for (int k = first_k; k - first_k < in.k; k += kStageK) {
            float xs[kBlocks][kColumnTiles][8] = {};
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int c = 0; c < kColumnTiles; ++c) {
                    if (x[c] < 0 || k + b * kBlockK >= in.k) continue;
                    load_x<Epilogue::kNormed>(in, in.x + x[c], k + b * kBlockK, xs[b][c], squares[c]);
                }
            }
            ptx::wait_copies<kStages - 1>();
            uint4 w[kBlocks][kTiles][2] = {};
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    if (k + b * kBlockK >= in.k || at * kTiles + t >= in.tiles) continue;
                    w[b][t][0] = slot(stage, t, b, 0), w[b][t][1] = slot(stage, t, b, 1);
                }
            }
            copy_stage(stage);
            stage = (stage + 1) % kStages;
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int c = 0; c < kColumnTiles; ++c) {
                    const MmaOperand<T> operand(xs[b][c]);
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) operand.multiply_add(sum[t][c], w[b][t]);
                }
            }
        }

        finish_tiles<kColumnTiles>(in, epilogue, rows, at * kTiles, in.tiles, sum, squares, early);
    }
}

}  // namespace skipkernels::cuda
