// y = w x with w in blocks (planes.cuh), on the tensor cores for 1 to 8 (kColumnTiles = 1) or 16 batch rows together.
//
// Lane 4 g + t of a warp takes rows g and g + 8 of a tile, and of each group of 128 columns a piece: 16 bytes of codes
// of 4 bits, so that the warp reads 64 neighbouring bytes of a row, and the scales beside them. Codes are whole numbers
// of at most 8 bits, or e4m3, which bf16 holds exactly: they enter the tensor cores as they are, x as the sum of three
// bf16, and the sums of 16 columns are multiplied with their scale as floats. Minima take the sum of x.
//
// A tile of 4 bits, 1 KB a warp and group, needs 24 mma, on an A100 48 cycles of some 80 in which its share of the
// memory delivers it. One row goes the same way: a row's bits depend neither on how many there are, nor on whose.
#pragma once

#include <type_traits>

#include "linear_mma.cuh"
#include "planes.cuh"

namespace skipkernels::cuda {

template <Format kFormat>
struct Blocks {};

// `w` is not looked at; k is a multiple of 32.
template <Format kFormat>
struct BlockLinear : Linear<Blocks<kFormat>> {
    Planes runs[2];  // of the first and the second run of a tile
    int64_t first_row[2];
    int first_tile;  // of the epilogue's, where a stack has several parts
};

template <Format kFormat>
struct BlockRing {
    static constexpr int kStageBytes = 2 * LanePiece<kFormat>::kBytes * kLinearThreads;
    static constexpr int kStages = static_cast<int>(kRingBytes) / kStageBytes;
    static_assert(kStages >= 3);

    static __device__ char* slot(int stage, int run) {
        return ptx::shared_memory() + stage * kStageBytes + run * (kStageBytes / 2);
    }
};

template <Format kFormat, int kColumnTiles, class Epilogue>
__device__ __forceinline__ void linear_blocks(const BlockLinear<kFormat>& in, const Epilogue& epilogue, Rows& rows,
                                              const Clock& clock) {
    using Piece = LanePiece<kFormat>;
    using Ring = BlockRing<kFormat>;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int group_row = lane / 4, quad = lane % 4, grid = in.blocks;
    const int groups = in.runs[0].groups, end = in.first_tile + in.tiles;

    const auto weight_row = [&](const Tile& tile, int run) {
        const int own = ptx::thread_index() % 32 / 4;
        return tile.first[run] + min(own, max(tile.count[run] - 1, 0)) - in.first_row[run];
    };
    // The copies run ahead by kStages groups, also into the next tiles.
    int index_ahead = in.first_tile + static_cast<int>(blockIdx.x), group_ahead = warp;
    auto copy_stage = [&](int stage) {
        if (group_ahead < groups && index_ahead < end) {
            const Tile tile = epilogue.tile(index_ahead);
#pragma unroll
            for (int run = 0; run < 2; ++run) {
                Piece::copy(Ring::slot(stage, run), ptx::thread_index(), kLinearThreads, in.runs[run],
                            weight_row(tile, run), group_ahead, ptx::thread_index() % 4, in.cache_policy);
            }
        }
        ptx::commit_copies();
        group_ahead += kLinearWarps;
        if (group_ahead >= groups) group_ahead = warp, index_ahead += grid;
    };
    for (int s = 0; s < Ring::kStages; ++s) copy_stage(s);

    int x[kColumnTiles];  // the lane's column of each operand is a batch row, which begins at this element; or -1
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
        const int row = rows.at(c * 8 + group_row);
        x[c] = row >= 0 ? row * in.k : -1;
    }
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();

    int stage = 0;
    for (int index = in.first_tile + static_cast<int>(blockIdx.x); index < end; index += grid) {
        typename Epilogue::Early early[1] = {};
        early_of_tiles<kColumnTiles>(epilogue, rows, index, end, early);
        float sum[1][kColumnTiles][4] = {}, squares[kColumnTiles] = {};
        for (int group = warp; group < groups; group += kLinearWarps) {
            ptx::wait_copies<Ring::kStages - 1>();
            const Tile tile = epilogue.tile(index);
            const auto odd = [&](int run) {
                return Piece::super_index(in.runs[run], weight_row(tile, run), group) % 2 != 0;
            };
            const Piece piece[2] = {{Ring::slot(stage, 0), ptx::thread_index(), kLinearThreads, odd(0)},
                                    {Ring::slot(stage, 1), ptx::thread_index(), kLinearThreads, odd(1)}};
            copy_stage(stage);
            stage = (stage + 1) % Ring::kStages;
#pragma unroll
            for (int j = 0; j < kGroupBlocks; ++j) {
                const int first_k = group * kGroupColumns + j * kBlockColumns + quad * 4;
                if (first_k >= in.k) break;    // of all lanes alike
                float all[kColumnTiles] = {};  // of the block's x in the lane's columns
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint2 codes[2] = {piece[0].codes(j, half), piece[1].codes(j, half)};
                    const uint32_t w[4] = {codes[0].x, codes[1].x, codes[0].y, codes[1].y};
#pragma unroll
                    for (int c = 0; c < kColumnTiles; ++c) {
                        float xs[4] = {}, d[4] = {};
                        if (x[c] >= 0) load_x<Epilogue::kNormed>(in, in.x + x[c], first_k + 16 * half, xs, squares[c]);
                        const Bf16Parts<2> parts(xs);
#pragma unroll
                        for (int p = parts.kParts - 1; p >= 0; --p) {
                            ptx::mma_bf16_m16n8k16(d, w, {parts.part[p][0], parts.part[p][1]});
                        }
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            sum[0][c][i] = fmaf(piece[i / 2].scale(j, half), d[i], sum[0][c][i]);
                            if constexpr (Piece::kTraits.has_min()) all[c] += xs[i];
                        }
                    }
                }
                if constexpr (Piece::kTraits.has_min()) {
#pragma unroll
                    for (int c = 0; c < kColumnTiles; ++c) {
                        all[c] += __shfl_xor_sync(kAllLanes, all[c], 1);
                        all[c] += __shfl_xor_sync(kAllLanes, all[c], 2);
                        const float of_column[2] = {__shfl_sync(kAllLanes, all[c], quad * 8),
                                                    __shfl_sync(kAllLanes, all[c], quad * 8 + 4)};
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            sum[0][c][i] = fmaf(piece[i / 2].minimum(j), of_column[i % 2], sum[0][c][i]);
                        }
                    }
                }
            }
        }
        finish_tiles<kColumnTiles>(in, epilogue, rows, index, end, sum, squares, early);
    }
}

}  // namespace skipkernels::cuda
