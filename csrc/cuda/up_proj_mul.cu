// intermediate (rows, intermediate) *= up @ x for the neurons of a list on the device, x = rms_norm(hidden_states); no
// other row of up_proj (intermediate, hidden) is read.
//
// The grid is as large as the device holds at once; its warps take pairs of the list in turn, as many as it has. A warp
// keeps 4 KB of weights under way. It adds a row's products as linear_rows.cuh does, with a sum for each of the warps
// that share a row there: a neuron's bits depend neither on the list it stands in nor on the other rows of the step,
// and where one row keeps all neurons they are those of gate_up_act.
//
// Llama-3-8B, bf16, half of the neurons: 7168 x 4096 weights, 59 MB, 14 us at 4.3 TB/s.
#include <algorithm>

#include "linear_rows.cuh"
#include "ops.h"
#include "wanted.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kParts = kRunWarps;  // sums of a row's products
constexpr int kTogether = 2;       // neurons that share a read of x
constexpr int kRowsTogether = 4;   // batch rows that share a read of weights
constexpr int kBlocksOfMultiprocessor = 2;

struct Shared {
    Rows rows;
    float scales[kRowsOfPass];  // 1 / rms of a row, or 1
};

// Columns [first, k) of a row, as a lane has them: V of them at a time for each of kAtOnce parts from `part` on.
template <int V, int kAtOnce, class Visit>
__device__ __forceinline__ void for_parts(int part, int first, int k, Visit visit) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + ((part + i) * 32 + lane) * V;
        if (at < k) visit(i, at);
    }
}

template <int V>
constexpr int kStride = kParts * 32 * V;

__device__ __forceinline__ float sum_of_parts(const float (&parts)[kParts]) {
    float sum = 0.0f;
#pragma unroll
    for (const float part : parts) sum += warp_sum(part);
    return sum;
}

// By the whole block, a warp for a row.
template <int V>
__device__ void find_scales(const UpProjMul& op, Shared& shared) {
    const int k = static_cast<int>(op.hidden_size);
    if (!op.post_attention_layernorm) {
        if (threadIdx.x < kRowsOfPass) shared.scales[threadIdx.x] = 1.0f;
        return;
    }
    for (int n = static_cast<int>(threadIdx.x) / 32; n < shared.rows.count(); n += kWarps) {
        const float* x = op.hidden_states + int64_t{shared.rows.at(n)} * k;
        float squares[kParts] = {};
        for (int first = 0; first < k; first += kStride<V>) {
            for_parts<V, kParts>(0, first, k, [&](int part, int at) {
                float xs[V];
                load_floats(x + at, xs);
#pragma unroll
                for (const float value : xs) squares[part] = fmaf(value, value, squares[part]);
            });
        }
        const float all = sum_of_parts(squares);
        if (threadIdx.x % 32 == 0) {
            shared.scales[n] = 1.0f / sqrtf(all / static_cast<float>(k) + op.rms_norm_eps);
        }
    }
}

// sums (kTogether, N) = w x norm. By a warp; every lane gets them.
template <class T, int V, int N>
__device__ __forceinline__ void multiply(const UpProjMul& op, uint64_t policy, const T* const (&w)[kTogether],
                                         const float* const (&x)[N], float (&sums)[kTogether][N]) {
    const int k = static_cast<int>(op.hidden_size);
    constexpr int kAtOnce = N == 1 ? kParts : kParts / 2;  // with more, registers would not do
    float parts[kTogether][N][kParts] = {};
    for (int first = 0; first < k; first += kStride<V>) {
#pragma unroll
        for (int part = 0; part < kParts; part += kAtOnce) {
            uint4 loaded[kAtOnce][kTogether] = {};
            for_parts<V, kAtOnce>(part, first, k, [&](int i, int at) {
#pragma unroll
                for (int r = 0; r < kTogether; ++r) {
                    if constexpr (V > 1) {
                        loaded[i][r] = ptx::load_weights(w[r] + at, policy);
                    } else {
                        loaded[i][r].x = __float_as_uint(to_float(w[r][at]));
                    }
                }
            });
            for_parts<V, kAtOnce>(part, first, k, [&](int i, int at) {
                float norm[V];
                if (op.post_attention_layernorm) {
                    load_floats(op.post_attention_layernorm + at, norm);
                } else {
#pragma unroll
                    for (float& each : norm) each = 1.0f;
                }
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float xs[V];
                    load_floats(x[n] + at, xs);
#pragma unroll
                    for (int v = 0; v < V; ++v) xs[v] *= norm[v];
#pragma unroll
                    for (int r = 0; r < kTogether; ++r) {
                        float& sum = parts[r][n][part + i];
#pragma unroll
                        for (int v = 0; v < V; ++v) {
                            const float weight = V > 1 ? element<T>(loaded[i][r], v) : __uint_as_float(loaded[i][r].x);
                            sum = fmaf(weight, xs[v], sum);
                        }
                    }
                }
            });
        }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) sums[r][n] = sum_of_parts(parts[r][n]);
    }
}

// Entries `entry`, entry + 1 of the list for rows [n, n + N) of the pass. By a warp.
template <class T, int V, int N>
__device__ __forceinline__ void multiply_pair(const UpProjMul& op, uint64_t policy, const Shared& shared, int entry,
                                              int listed, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int64_t neurons[kTogether];
    const T* w[kTogether];
    const float* x[N];
    float sums[kTogether][N];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
        neurons[r] = op.neurons[min(entry + r, listed - 1)];
        w[r] = static_cast<const T*>(op.up_proj.data) + neurons[r] * op.hidden_size;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        x[n] = op.hidden_states + shared.rows.at(min(first + n, shared.rows.count() - 1)) * op.hidden_size;
    }
    multiply<T, V, N>(op, policy, w, x, sums);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (lane != r * N + n || entry + r >= listed || first + n >= shared.rows.count()) continue;
            float& value = op.intermediate[shared.rows.at(first + n) * op.intermediate_size + neurons[r]];
            if (value != 0.0f) value *= sums[r][n] * shared.scales[first + n];
        }
    }
}

template <class T, int V, bool kSeveralRows>
__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    up_proj_mul_kernel(const __grid_constant__ UpProjMul op, const __grid_constant__ Wanted wanted, uint64_t policy) {
    const Clock clock(wanted.stamps);
    if (!wanted.wait(clock)) return;
    auto& shared = *reinterpret_cast<Shared*>(ptx::shared_memory());
    const int listed = *op.num_neurons, stride = static_cast<int>(gridDim.x) * kWarps * kTogether;
    const int begin = (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32) * kTogether;
    for (int first = 0; first < wanted.num_rows;) {
        if (threadIdx.x < 32) shared.rows.find(wanted.row_mask, wanted.num_rows, first);
        __syncthreads();
        find_scales<V>(op, shared);
        __syncthreads();
        const int count = shared.rows.count();
        for (int entry = begin; entry < listed; entry += stride) {
            int n = 0;
            if constexpr (kSeveralRows) {
                for (; count - n > 1; n += kRowsTogether) {
                    multiply_pair<T, V, kRowsTogether>(op, policy, shared, entry, listed, n);
                }
            }
            if (n < count) multiply_pair<T, V, 1>(op, policy, shared, entry, listed, n);
        }
        first = shared.rows.end;
        __syncthreads();  // before the next rows are left there
    }
}

}  // namespace

cudaError_t launch_up_proj_mul(const Step& step, const LaunchContext& context) {
    const UpProjMul& op = step.ins.up_proj_mul;
    return with_float_type(op.up_proj.format, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kVector<T>;
        const bool vectors = op.hidden_size % V == 0 && is_aligned(op.up_proj.data) && is_aligned(op.hidden_states) &&
                             is_aligned(op.post_attention_layernorm);
        const bool several = step.ins.num_rows > 1;
        auto kernel = vectors ? (several ? up_proj_mul_kernel<T, V, true> : up_proj_mul_kernel<T, V, false>)
                              : (several ? up_proj_mul_kernel<T, 1, true> : up_proj_mul_kernel<T, 1, false>);
        const int64_t most = ceil_div(op.intermediate_size, kWarps * kTogether);
        const auto grid = static_cast<unsigned>(std::min<int64_t>(most, kBlocksOfMultiprocessor * context.num_sms));
        return launch_kernel(context, kernel, grid, kThreads, sizeof(Shared), op, Wanted(step, context),
                             step.evicts_first ? kEvictFirst : kEvictNormal);
    });
}

}  // namespace skipkernels::cuda
