// hidden_states (rows, hidden) += sum over a row's chosen experts, in the order of their ids, of weight *
// (expert_intermediate (rows, choices, expert) @ down_proj (experts, expert, hidden) + down_proj_bias (experts,
// hidden)), where only rows of neurons are read whose product is not 0. similarity_partials as for down_proj_add.
//
// A block has some columns of one row, 16 bytes a lane; its warps share the neurons of each expert and have 8 rows of
// weights under way. Rows with the same expert run next to one another and share its weights in L2.
#include "experts.cuh"
#include "ops.h"
#include "residual.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnderWay = 8;  // rows of weights

// sum (V) += products of neurons [first, end) times the columns of their rows w; by a warp
template <class T, int V>
__device__ __forceinline__ void add_neurons(const T* w, int64_t hidden_size, bool inside, const float* products,
                                            int64_t first, int64_t end, uint64_t policy, float (&sum)[V]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int64_t base = first; base < end; base += 32) {
        const float own = base + lane < end ? products[base + lane] : 0.0f;
        uint32_t kept = __ballot_sync(kAllLanes, own != 0.0f);
        while (kept) {
            uint4 loaded[kUnderWay];
            float values[kUnderWay] = {};
#pragma unroll
            for (int u = 0; u < kUnderWay; ++u) {
                if (!kept) continue;
                const int at = __ffs(static_cast<int>(kept)) - 1;
                kept &= kept - 1;
                values[u] = __shfl_sync(kAllLanes, own, at);
                if (!inside) continue;
                const T* from = w + (base + at) * hidden_size;
                if constexpr (V > 1) {
                    loaded[u] = ptx::load_weights(from, policy);
                } else {
                    loaded[u].x = __float_as_uint(to_float(*from));
                }
            }
#pragma unroll
            for (int u = 0; u < kUnderWay; ++u) {
                if (values[u] == 0.0f || !inside) continue;
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float weight = V > 1 ? element<T>(loaded[u], i) : __uint_as_float(loaded[u].x);
                    sum[i] = fmaf(values[u], weight, sum[i]);
                }
            }
        }
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    experts_down_proj_neurons_add_kernel(const __grid_constant__ ExpertsDownProjNeuronsAdd op, const int32_t* row_mask,
                                         uint64_t policy, Stamps stamps) {
    constexpr int kColumns = 32 * V;
    static_assert(kColumns <= kThreads);
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.x;
    if (!row_mask[row]) return;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int64_t column = int64_t{blockIdx.y} * kColumns + lane * V, size = op.expert_size, hidden = op.hidden_size;
    const int64_t first = warp * ceil_div(size, kWarps), end = min(first + ceil_div(size, kWarps), size);
    const int listed = op.expert_begins[op.num_begins - 1];
    float total[V] = {};
    for (int entry = 0; entry < listed; ++entry) {
        const int pair = op.expert_pairs[entry];
        if (pair / op.experts_per_token != row) continue;
        const int64_t expert = expert_at(op.expert_begins, op.num_begins, entry);
        const T* w = static_cast<const T*>(op.down_proj.data) + expert * size * hidden + column;
        float sum[V] = {};
        add_neurons<T, V>(w, hidden, column < hidden, op.expert_intermediate + pair * size, first, end, policy, sum);
#pragma unroll
        for (int i = 0; i < V; ++i) total[i] = fmaf(op.expert_weights[pair], sum[i], total[i]);
    }
    auto* sums = reinterpret_cast<float*>(ptx::shared_memory());  // (warps, columns)
#pragma unroll
    for (int i = 0; i < V; ++i) sums[warp * kColumns + lane * V + i] = total[i];
    __syncthreads();
    if (thread >= kColumns) return;  // whole warps
    const int64_t channel = int64_t{blockIdx.y} * kColumns + thread;
    const bool inside = channel < hidden;
    float before = 0.0f, after = 0.0f;
    if (inside) {
        float change = 0.0f;
        for (int i = 0; i < kWarps; ++i) change += sums[i * kColumns + thread];
        float& stream = op.hidden_states[row * hidden + channel];
        before = stream;
        stream = after = before + (change + biases_of(op, row, channel));
    }
    if (!op.similarity_partials || row >= op.num_sequences) return;
    const int64_t partial = channel / kRowsPerPartial;
    const bool exists = partial < op.num_partials;
    compare_channels(exists ? op.similarity_partials + (partial * op.num_sequences + row) * 3 : nullptr, inside, before,
                     after);
}

template <class T, int V>
cudaError_t launch_columns(const Step& step, const LaunchContext& context) {
    const ExpertsDownProjNeuronsAdd& op = step.ins.experts_down_proj_neurons_add;
    const dim3 grid(static_cast<unsigned>(op.num_rows), static_cast<unsigned>(ceil_div(op.hidden_size, 32 * V)));
    return launch_kernel(context, experts_down_proj_neurons_add_kernel<T, V>, grid, kThreads,
                         kWarps * 32 * V * sizeof(float), op, step.ins.row_mask,
                         step.evicts_first ? kEvictFirst : kEvictNormal, context.stamps);
}

}  // namespace

cudaError_t launch_experts_down_proj_neurons_add(const Step& step, const LaunchContext& context) {
    const ExpertsDownProjNeuronsAdd& op = step.ins.experts_down_proj_neurons_add;
    return with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        const bool vectors = op.hidden_size % kVector<T> == 0 && is_aligned(op.down_proj.data);
        return vectors ? launch_columns<T, kVector<T>>(step, context) : launch_columns<T, 1>(step, context);
    });
}

}  // namespace skipkernels::cuda
