// intermediate (rows, intermediate) = 0 below each row's own thresholds, and the list of what is not 0 in some row.
//
// A block has a segment of the neurons and goes through the rows; it leaves a bit for each neuron that some row keeps.
// The last block to finish counts the bits of all segments and writes the list: in the order of the neurons, whatever
// the order of the blocks. 57 KB a row of Llama-3-8B, from L2.
#include "ops.h"
#include "wanted.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWordsOfWarp = 4;  // of 32 neurons
constexpr int kSegment = kThreads * kWordsOfWarp;

__host__ __device__ constexpr int64_t num_segments(const SelectNeurons& op) {
    return ceil_div(op.intermediate_size, kSegment);
}

// Scratch: a bit for each neuron, in words of 32; then what each warp of each segment counted, by row.
__host__ __device__ constexpr int64_t num_words(const SelectNeurons& op) { return num_segments(op) * kSegment / 32; }
__host__ __device__ constexpr int64_t num_counts(const SelectNeurons& op) { return num_segments(op) * kWarps; }

struct Shared {
    uint32_t words[kThreads];
    int before[kThreads];  // neurons that are listed before those of the word
    int of_warp[kWarps];
    bool is_last;
};

// Of the block's segment: values = 0 below the threshold, words, counts.
__device__ void leave_out(const SelectNeurons& op, const Wanted& wanted, uint32_t* words, int32_t* counts) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * kWordsOfWarp * 32;
    uint32_t kept[kWordsOfWarp] = {};
    for (int row = 0; row < wanted.num_rows; ++row) {
        if (!wanted.has(row)) continue;
        const int64_t layer = op.row_sequence[row] * op.num_hidden_layers + op.layer;
        const float* thresholds = op.neuron_thresholds + layer * op.num_thresholds;
        const float scale = op.neuron_scale[row];
        int count = 0;
#pragma unroll
        for (int word = 0; word < kWordsOfWarp; ++word) {
            const int64_t neuron = first + word * 32 + lane;
            float value = 0.0f;
            if (neuron < op.intermediate_size) {
                float* at = op.intermediate + row * op.intermediate_size + neuron;
                value = *at;
                if (fabsf(value) < thresholds[op.num_thresholds == 1 ? 0 : neuron] * scale) *at = value = 0.0f;
            }
            const uint32_t set = __ballot_sync(kAllLanes, value != 0.0f);
            kept[word] |= set;
            count += __popc(set);
        }
        if (lane == 0) counts[row * num_counts(op) + int64_t{blockIdx.x} * kWarps + warp] = count;
    }
#pragma unroll
    for (int word = 0; word < kWordsOfWarp; ++word) {
        if (lane == 0) words[first / 32 + word] = kept[word];
    }
}

// The neurons whose bits are set. By the whole block.
__device__ void list(const SelectNeurons& op, const uint32_t* words, Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int total = static_cast<int>(num_words(op));
    int listed = 0;
    for (int first = 0; first < total; first += kThreads) {
        const uint32_t own = first + thread < total ? words[first + thread] : 0;
        int before = __popc(own);  // including its own
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int left = __shfl_up_sync(kAllLanes, before, lanes);
            if (lane >= lanes) before += left;
        }
        if (lane == 31) shared.of_warp[warp] = before;
        __syncthreads();
        int all = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            if (i == warp) before += all;
            all += shared.of_warp[i];
        }
        shared.words[thread] = own;
        shared.before[thread] = listed + before - __popc(own);
        __syncthreads();
        const int count = min(kThreads, total - first);
        for (int word = warp; word < count; word += kWarps) {
            const uint32_t bits = shared.words[word];
            if (!(bits >> lane & 1)) continue;
            op.neurons[shared.before[word] + __popc(bits & ((uint32_t{1} << lane) - 1))] = (first + word) * 32 + lane;
        }
        listed += all;
        __syncthreads();  // before the next words are left there
    }
    if (thread == 0) *op.num_neurons = listed;
}

// What each decode row keeps, by a warp.
__device__ void record(const SelectNeurons& op, const Wanted& wanted, const int32_t* counts) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int row = warp; row < op.num_sequences; row += kWarps) {
        if (!wanted.has(row)) continue;
        int count = 0;
        for (int64_t i = lane; i < num_counts(op); i += 32) count += counts[row * num_counts(op) + i];
#pragma unroll
        for (int lanes = 16; lanes; lanes /= 2) count += __shfl_xor_sync(kAllLanes, count, lanes);
        if (lane) continue;
        const int64_t token = row * op.max_seq_len + op.num_generated[row];
        op.kept_map[(token * op.num_hidden_layers + op.layer) * 2 + op.stage] = count;
        op.left_out[row] += (op.intermediate_size - count) * op.neuron_bytes;
    }
}

__global__ void __launch_bounds__(kThreads)
    select_neurons_kernel(const __grid_constant__ SelectNeurons op, const __grid_constant__ Wanted wanted,
                          int32_t* arrivals, float* scratch) {
    const Clock clock(wanted.stamps);
    if (!wanted.wait(clock)) return;
    auto& shared = *reinterpret_cast<Shared*>(ptx::shared_memory());
    auto* words = reinterpret_cast<uint32_t*>(scratch);
    auto* counts = reinterpret_cast<int32_t*>(words + num_words(op));
    leave_out(op, wanted, words, counts);
    if (!is_last_block(arrivals, static_cast<int>(gridDim.x), shared.is_last)) return;
    list(op, words, shared);
    record(op, wanted, counts);
}

}  // namespace

int64_t select_neurons_scratch_floats(const SelectNeurons& op) { return num_words(op) + op.num_rows * num_counts(op); }

cudaError_t launch_select_neurons(const Step& step, const LaunchContext& context) {
    const SelectNeurons& op = step.ins.select_neurons;
    return launch_kernel(context, select_neurons_kernel, static_cast<unsigned>(num_segments(op)), kThreads,
                         sizeof(Shared), op, Wanted(step, context), step.arrivals, step.scratch);
}

}  // namespace skipkernels::cuda
