// The kernel of the linear family and its launch: chooses the way for the rows there are.
#pragma once

#include <algorithm>

#include "linear_blocks.cuh"
#include "linear_mma.cuh"
#include "linear_rows.cuh"

namespace skipkernels::cuda {

// Rows from which the tensor cores are used; 2 since one row leaves 7 of their 8 columns idle.
constexpr int kMmaRows = 2;

// How a pass over floats is computed. kColumnTiles 0: never on the tensor cores.
template <int V, int kColumnTiles, int kTiles>
struct FloatWay {
    static constexpr int kUnitTiles = kColumnTiles ? kTiles : 1;

    static constexpr size_t shared_bytes() {
        if constexpr (kColumnTiles == 0) return kRowsSharedBytes;
        return std::max(kRowsSharedBytes, kSumsAt + MmaSums<kColumnTiles, kTiles>::kBytes);
    }
    template <class T, class Epilogue>
    static __device__ __forceinline__ void pass(const Linear<T>& in, const Epilogue& epilogue, Rows& rows,
                                                const Clock& clock) {
        if constexpr (kColumnTiles > 0) {
            if (rows.count() >= kMmaRows) return linear_mma<T, kColumnTiles, kTiles>(in, epilogue, rows, clock);
        }
        linear_rows<T, V>(in, epilogue, rows, clock);
    }
};

// And over blocks.
template <int kColumnTiles>
struct BlockWay {
    static constexpr int kUnitTiles = 1;

    static constexpr size_t shared_bytes() { return kSumsAt + MmaSums<kColumnTiles, 1>::kBytes; }
    template <Format kFormat, class Epilogue>
    static __device__ __forceinline__ void pass(const BlockLinear<kFormat>& in, const Epilogue& epilogue, Rows& rows,
                                                const Clock& clock) {
        linear_blocks<kFormat, kColumnTiles>(in, epilogue, rows, clock);
    }
};

// More rows than kRowsOfPass take several passes over the weights.
template <class Way, class In, class Epilogue>
__global__ void __launch_bounds__(kLinearThreads, 2)
    linear_kernel(const __grid_constant__ In in, const __grid_constant__ Epilogue epilogue) {
    const Clock clock(in.stamps);
    if constexpr (Epilogue::kHasExtraBlock) {
        if (static_cast<int>(blockIdx.x) == in.blocks) {
            ptx::grid_dependency_wait();
            ptx::grid_dependency_launch();
            epilogue.extra_block(in.row_mask);
            return;
        }
    }
    if (!in.when_is_settled) ptx::grid_dependency_wait();
    Rows& rows = rows_of_pass();
    for (int first = 0; first < in.num_rows;) {
        if (threadIdx.x < 32) rows.find(in.row_mask, in.num_rows, first);
        __syncthreads();
        if (rows.count() == 0) {
            if (in.triggers_early) ptx::grid_dependency_launch();
            ptx::grid_dependency_wait();
            return;
        }
        Way::pass(in, epilogue, rows, clock);
        first = rows.end;
        __syncthreads();  // nobody reads the rows, or the sums of the last tile, any more
    }
}

template <class Way, class In, class Epilogue>
cudaError_t launch_linear_kernel(const In& in, const Epilogue& epilogue, const LaunchContext& context) {
    In cut = in;
    cut.blocks = std::min(static_cast<int>(ceil_div(in.tiles, Way::kUnitTiles)), context.num_sms);
    cut.stamps = context.stamps;
    unsigned grid = static_cast<unsigned>(cut.blocks);
    if constexpr (Epilogue::kHasExtraBlock) grid += epilogue.wants_extra_block;
    return launch_kernel(context, linear_kernel<Way, In, Epilogue>, grid, kLinearThreads, Way::shared_bytes(), cut,
                         epilogue);
}

// The operands that every projection has: w (m, k), of which a tile is kTileRows rows, and x (num_rows, k).
template <class T>
Linear<T> make_linear(const Step& step, const void* w, const float* x, int64_t k, int64_t tiles,
                      const float* norm = nullptr, float eps = 0.0f) {
    return {static_cast<const T*>(w),
            x,
            norm,
            eps,
            step.ins.row_mask,
            step.flags_are_settled,
            static_cast<int>(step.ins.num_rows),
            static_cast<int>(k),
            static_cast<int>(tiles),
            0,
            step.triggers_early,
            step.touches_settled,
            step.evicts_first ? kEvictFirst : kEvictNormal,
            nullptr};
}

template <class T, class Epilogue>
cudaError_t launch_linear(const Linear<T>& in, const Epilogue& epilogue, const LaunchContext& context) {
    constexpr int V = kVector<T>;
    const bool vectors = in.k % V == 0 && is_aligned(in.w) && is_aligned(in.x) && is_aligned(in.norm);
    if (!vectors) return launch_linear_kernel<FloatWay<1, 0, 1>>(in, epilogue, context);
    if constexpr (V == 8) {
        if (in.num_rows > 8) return launch_linear_kernel<FloatWay<V, 2, 2>>(in, epilogue, context);
        if (in.num_rows >= kMmaRows) {
            if (in.tiles >= 2 * context.num_sms) return launch_linear_kernel<FloatWay<V, 1, 2>>(in, epilogue, context);
            return launch_linear_kernel<FloatWay<V, 1, 1>>(in, epilogue, context);
        }
    }
    return launch_linear_kernel<FloatWay<V, 0, 1>>(in, epilogue, context);
}

template <Format kFormat, class Epilogue>
cudaError_t launch_linear(const BlockLinear<kFormat>& in, const Epilogue& epilogue, const LaunchContext& context) {
    if (in.num_rows > 8) return launch_linear_kernel<BlockWay<2>>(in, epilogue, context);
    return launch_linear_kernel<BlockWay<1>>(in, epilogue, context);
}

// A projection by one part of blocks, or by two of one format whose rows are the two runs of each tile.
template <Format kFormat>
BlockLinear<kFormat> make_block_linear(const Step& step, const MatrixPart& first, const MatrixPart& second,
                                       const float* x, int64_t k, int64_t tiles, const float* norm, float eps) {
    BlockLinear<kFormat> in{make_linear<Blocks<kFormat>>(step, nullptr, x, k, tiles, norm, eps), {}, {}, 0};
    in.runs[0] = Planes(first.data, kFormat, first.rows, k);
    in.runs[1] = Planes(second.data, kFormat, second.rows, k);
    return in;
}

// w (m, k), of which a tile is kTileRows rows, times x (num_rows, k), whatever the weights are.
template <class Epilogue>
cudaError_t launch_projection(const Step& step, const Matrix& w, const float* x, int64_t k, int64_t tiles,
                              const Epilogue& epilogue, const LaunchContext& context, const float* norm = nullptr,
                              float eps = 0.0f) {
    if (is_float(w.format)) {
        return with_float_type(w.format, [&](auto type) {
            return launch_linear(make_linear<decltype(type)>(step, w.data, x, k, tiles, norm, eps), epilogue, context);
        });
    }
    return with_block_format(w.format, [&](auto format) {
        const auto in =
            make_block_linear<decltype(format)::value>(step, w.parts[0], w.parts[0], x, k, tiles, norm, eps);
        return launch_linear(in, epilogue, context);
    });
}

}  // namespace skipkernels::cuda
