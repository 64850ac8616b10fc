// hidden_states (rows, hidden) += products (rows, intermediate) @ down_proj (intermediate, hidden), which lies
// transposed: one neuron a row, and only rows of neurons are read whose product is not 0 in some row; and
// similarity_partials as down_proj_add has them.
//
// select_neurons lists a neuron exactly where some row's product is not 0, so the products say which rows to read, also
// where there is no list.
//
// A block has some columns, 16 bytes a lane, of a chunk of the neurons; its warps share the chunk's neurons. A warp
// first gathers those that are kept, then has 8 rows of weights under way. Sums of warps and of chunks are added in
// their order, and a neuron that a row does not keep adds nothing to it, whoever reads it: the same bits on any number
// of multiprocessors and beside any other rows. With up to 16 rows the chunks run side by side and leave their sums in
// scratch, and the last block of a column adds them; more rows are work enough for blocks that take all chunks.
//
// Llama-3-8B, bf16, half of the neurons: 7168 x 4096 weights, 59 MB, 14 us at 4.3 TB/s; a row's scratch is 0.5 MB.
#include "ops.h"
#include "residual.cuh"
#include "wanted.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnderWay = 8;      // rows of weights
constexpr int kRowsTogether = 4;  // batch rows that share a read of weights

__host__ __device__ constexpr int64_t num_chunks(const DownProjNeuronsAdd& op) {
    return ceil_div(op.intermediate_size, op.neuron_chunk);
}
__host__ __device__ constexpr int64_t neurons_of_warp(const DownProjNeuronsAdd& op) {
    return ceil_div(op.neuron_chunk, kWarps);
}

template <class T, int V, int N>
class Block {
  public:
    static constexpr int kColumns = 32 * V;
    static_assert(kColumns <= kThreads);

    __device__ Block(const DownProjNeuronsAdd& op, const Wanted& wanted, uint64_t policy)
        : op_(op), wanted_(wanted), policy_(policy) {
        sums_ = reinterpret_cast<float*>(ptx::shared_memory());
        auto* behind = sums_ + kWarps * N * kColumns + warp() * (1 + N) * neurons_of_warp(op);
        values_ = behind;
        kept_ = reinterpret_cast<int32_t*>(behind + N * neurons_of_warp(op));
    }

    static size_t shared_bytes(const DownProjNeuronsAdd& op) {
        return kWarps * (N * kColumns + (1 + N) * neurons_of_warp(op)) * sizeof(float);
    }

    // total (N) += what a chunk adds to the thread's column, for rows [row, row + N). By the whole block.
    __device__ void add_chunk(int row, int64_t chunk, float (&total)[N]) {
        const int64_t first = chunk * op_.neuron_chunk + warp() * neurons_of_warp(op_);
        const int64_t end =
            min(min(first + neurons_of_warp(op_), (chunk + 1) * op_.neuron_chunk), op_.intermediate_size);
        add_kept(gather(row, first, end));
        __syncthreads();
        if (thread() < kColumns) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float sum = 0.0f;
                for (int i = 0; i < kWarps; ++i) sum += sums_[(i * N + n) * kColumns + thread()];
                total[n] += sum;
            }
        }
        __syncthreads();  // before the next sums are left there
    }

    // Adds `change` to the thread's column of a row. By the whole block.
    __device__ void finish(int row, float change) const {
        if (thread() >= kColumns) return;  // whole warps
        const int64_t column = own_column();
        const bool inside = column < op_.hidden_size;
        float before = 0.0f, after = 0.0f;
        if (inside) {
            float& hidden = op_.hidden_states[row * op_.hidden_size + column];
            before = hidden;
            hidden = after = before + change;
        }
        if (!op_.similarity_partials || row >= op_.num_sequences) return;
        const int64_t partial = column / kRowsPerPartial;
        const bool exists = partial < op_.num_partials;
        compare_channels(exists ? op_.similarity_partials + (partial * op_.num_sequences + row) * 3 : nullptr, inside,
                         before, after);
    }

    // The thread's column in a chunk's sums (chunks, rows, hidden); null where it has none.
    __device__ float* in(float* scratch, int64_t chunk, int row) const {
        const bool has_column = thread() < kColumns && own_column() < op_.hidden_size;
        return has_column ? scratch + (chunk * wanted_.num_rows + row) * op_.hidden_size + own_column() : nullptr;
    }

  private:
    __device__ static int thread() { return static_cast<int>(threadIdx.x); }
    __device__ static int warp() { return thread() / 32; }
    __device__ static int lane() { return thread() % 32; }
    __device__ static int64_t own_column() { return int64_t{blockIdx.x} * kColumns + thread(); }

    // Of neurons [first, end), those that some of the rows keep, and their products; returns their number. By a warp.
    __device__ int gather(int row, int64_t first, int64_t end) {
        int found = 0;
        for (int64_t base = first; base < end; base += 32) {
            const int64_t neuron = base + lane();
            float value[N] = {};
            bool any = false;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (neuron < end && wanted_.has(row + n)) {
                    value[n] = op_.intermediate[(row + n) * op_.intermediate_size + neuron];
                }
                any |= value[n] != 0.0f;
            }
            const uint32_t set = __ballot_sync(kAllLanes, any);
            if (any) {
                const int at = found + __popc(set & ((uint32_t{1} << lane()) - 1));
                kept_[at] = static_cast<int32_t>(neuron);
#pragma unroll
                for (int n = 0; n < N; ++n) values_[n * neurons_of_warp(op_) + at] = value[n];
            }
            found += __popc(set);
        }
        __syncwarp();
        return found;
    }

    // The gathered products times their weights -> the warp's sums_.
    __device__ void add_kept(int found) {
        const int64_t column = int64_t{blockIdx.x} * kColumns + lane() * V;
        const T* w = static_cast<const T*>(op_.down_proj.data) + column;
        float sum[N][V] = {};
        for (int at = 0; column < op_.hidden_size && at < found; at += kUnderWay) {
            uint4 loaded[kUnderWay];
#pragma unroll
            for (int u = 0; u < kUnderWay; ++u) {
                if (at + u >= found) continue;
                const T* from = w + kept_[at + u] * op_.hidden_size;
                if constexpr (V > 1) {
                    loaded[u] = ptx::load_weights(from, policy_);
                } else {
                    loaded[u].x = __float_as_uint(to_float(*from));
                }
            }
#pragma unroll
            for (int u = 0; u < kUnderWay; ++u) {
                if (at + u >= found) continue;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float value = values_[n * neurons_of_warp(op_) + at + u];
                    if (value == 0.0f) continue;  // a neighbour's neuron
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const float weight = V > 1 ? element<T>(loaded[u], i) : __uint_as_float(loaded[u].x);
                        sum[n][i] = fmaf(value, weight, sum[n][i]);
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < V; ++i) sums_[(warp() * N + n) * kColumns + lane() * V + i] = sum[n][i];
        }
        __syncwarp();  // before the next are gathered
    }

    const DownProjNeuronsAdd& op_;
    const Wanted& wanted_;
    uint64_t policy_;
    float *sums_, *values_;  // (warps, N, columns); of the warp: (N, neurons)
    int32_t* kept_;          // of the warp
};

template <int N>
__device__ bool any_of(const Wanted& wanted, int row) {
    bool any = false;
#pragma unroll
    for (int n = 0; n < N; ++n) any |= wanted.has(row + n);
    return any;
}

// blockIdx.y is a chunk.
template <class T, int V, int N>
__global__ void __launch_bounds__(kThreads, 2)
    add_side_by_side_kernel(const __grid_constant__ DownProjNeuronsAdd op, const __grid_constant__ Wanted wanted,
                            uint64_t policy, int32_t* arrivals, float* scratch) {
    const Clock clock(wanted.stamps);
    if (!wanted.wait(clock)) return;
    Block<T, V, N> block(op, wanted, policy);
    for (int row = 0; row < wanted.num_rows; row += N) {
        if (!any_of<N>(wanted, row)) continue;
        float total[N] = {};
        block.add_chunk(row, blockIdx.y, total);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (!wanted.has(row + n)) continue;
            if (float* to = block.in(scratch, blockIdx.y, row + n)) *to = total[n];
        }
    }
    auto& is_last = *reinterpret_cast<bool*>(ptx::shared_memory());
    if (!is_last_block(arrivals + blockIdx.x, static_cast<int>(gridDim.y), is_last)) return;
    for (int row = 0; row < wanted.num_rows; ++row) {
        if (!wanted.has(row)) continue;
        float change = 0.0f;
        for (int64_t chunk = 0; chunk < num_chunks(op); ++chunk) {
            if (const float* from = block.in(scratch, chunk, row)) change += *from;
        }
        block.finish(row, change);
    }
}

// blockIdx.y is a group of N rows.
template <class T, int V, int N>
__global__ void __launch_bounds__(kThreads, 2)
    add_in_turn_kernel(const __grid_constant__ DownProjNeuronsAdd op, const __grid_constant__ Wanted wanted,
                       uint64_t policy) {
    const Clock clock(wanted.stamps);
    if (!wanted.wait(clock)) return;
    const int row = static_cast<int>(blockIdx.y) * N;
    if (!any_of<N>(wanted, row)) return;
    Block<T, V, N> block(op, wanted, policy);
    float total[N] = {};
    for (int64_t chunk = 0; chunk < num_chunks(op); ++chunk) block.add_chunk(row, chunk, total);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        if (wanted.has(row + n)) block.finish(row + n, total[n]);
    }
}

template <class T, int V>
cudaError_t launch_columns(const Step& step, const LaunchContext& context) {
    const DownProjNeuronsAdd& op = step.ins.down_proj_neurons_add;
    const Wanted wanted(step, context);
    const uint64_t policy = step.evicts_first ? kEvictFirst : kEvictNormal;
    const auto columns = static_cast<unsigned>(ceil_div(op.hidden_size, Block<T, V, 1>::kColumns));
    const auto chunks = static_cast<unsigned>(num_chunks(op));
    if (op.num_rows == 1) {
        return launch_kernel(context, add_side_by_side_kernel<T, V, 1>, dim3(columns, chunks), kThreads,
                             Block<T, V, 1>::shared_bytes(op), op, wanted, policy, step.arrivals, step.scratch);
    }
    const size_t shared_bytes = Block<T, V, kRowsTogether>::shared_bytes(op);
    if (op.num_rows <= kRowsOfPass) {
        return launch_kernel(context, add_side_by_side_kernel<T, V, kRowsTogether>, dim3(columns, chunks), kThreads,
                             shared_bytes, op, wanted, policy, step.arrivals, step.scratch);
    }
    const auto groups = static_cast<unsigned>(ceil_div(op.num_rows, kRowsTogether));
    return launch_kernel(context, add_in_turn_kernel<T, V, kRowsTogether>, dim3(columns, groups), kThreads,
                         shared_bytes, op, wanted, policy);
}

}  // namespace

int64_t down_proj_neurons_add_arrivals(const DownProjNeuronsAdd& op) { return ceil_div(op.hidden_size, 32); }

int64_t down_proj_neurons_add_scratch_floats(const DownProjNeuronsAdd& op) {
    return op.num_rows <= kRowsOfPass ? num_chunks(op) * op.num_rows * op.hidden_size : 0;
}

cudaError_t launch_down_proj_neurons_add(const Step& step, const LaunchContext& context) {
    const DownProjNeuronsAdd& op = step.ins.down_proj_neurons_add;
    return with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        const bool vectors = op.hidden_size % kVector<T> == 0 && is_aligned(op.down_proj.data);
        return vectors ? launch_columns<T, kVector<T>>(step, context) : launch_columns<T, 1>(step, context);
    });
}

}  // namespace skipkernels::cuda
