// expert_intermediate (rows, choices, expert) = act(gate @ x) * (up @ x) of each chosen expert, x =
// rms_norm(hidden_states); gate_up_proj (experts, 2 expert, hidden), gate_up_bias (experts, 2 expert).
//
// A block is 32 channels of one entry of the list of choices. Entries of one expert are neighbours, so of several rows
// that chose it the first reads its weights and the others find them in L2. Where neurons are left out, a warp reads a
// row of up only if the row of gate before it came to enough.
//
// Qwen3-30B-A3B, bf16, one row: 8 experts of 1536 x 2048 weights, 50 MB, 12 us at 4.3 TB/s.
#include "activation.cuh"
#include "block_sum.cuh"
#include "experts.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kChannelsOfWarp = 4, kChannels = kWarps * kChannelsOfWarp;

template <class T, int V, bool leaves_out>
__global__ void __launch_bounds__(kThreads, 1)  // without the 1, ptxas keeps to 48 or 64 registers and spills
    experts_gate_up_act_kernel(const __grid_constant__ ExpertsGateUpAct op, const int32_t* row_mask, uint64_t policy,
                               Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int entry = static_cast<int>(blockIdx.y);
    if (entry >= op.expert_begins[op.num_begins - 1]) return;
    const int pair = op.expert_pairs[entry];
    const int64_t row = pair / op.experts_per_token;
    if (!row_mask[row]) return;  // of a step before: in this one no row is wanted
    const int thread = static_cast<int>(threadIdx.x), k = static_cast<int>(op.hidden_size);
    float* x = reinterpret_cast<float*>(ptx::shared_memory());
    float squares = 0.0f;
    for (int i = thread; i < k; i += kThreads) {
        const float value = op.hidden_states[row * k + i];
        squares = fmaf(value, value, squares);
        x[i] = value * op.post_attention_layernorm[i];
    }
    squares = block_sum(squares, x + ceil_div(k, 4) * 4);
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(k) + op.rms_norm_eps);
    const int64_t expert = expert_at(op.expert_begins, op.num_begins, entry), size = op.expert_size;
    const T* gate_rows = static_cast<const T*>(op.gate_up_proj.data) + expert * 2 * size * k;
    const float* bias = op.gate_up_bias ? op.gate_up_bias + expert * 2 * size : nullptr;
    const auto activation = static_cast<Activation>(op.activation);
    float least = 0.0f;
    if constexpr (leaves_out) {
        least = op.gate_thresholds[op.row_sequence[row] * op.num_hidden_layers + op.layer] * op.neuron_scale[row];
    }
    const int64_t first = int64_t{blockIdx.x} * kChannels + thread / 32 * kChannelsOfWarp;
    for (int64_t channel = first; channel < first + kChannelsOfWarp && channel < size; ++channel) {
        float gate = warp_dot<T, V>(gate_rows + channel * k, x, k, policy) * scale;
        if (bias) gate += bias[channel];
        float& out = op.expert_intermediate[pair * size + channel];
        if constexpr (leaves_out) {
            const float value = activated(activation, gate);
            if (fabsf(value) < least || value == 0.0f) {  // for the whole warp
                if (thread % 32 == 0) out = 0.0f;
                continue;
            }
        }
        float up = warp_dot<T, V>(gate_rows + (size + channel) * k, x, k, policy) * scale;
        if (bias) up += bias[size + channel];
        if (thread % 32 == 0) out = gated(activation, gate, up);
    }
}

template <bool leaves_out>
cudaError_t launch_kind(const Step& step, const LaunchContext& context) {
    const ExpertsGateUpAct& op = step.ins.experts_gate_up_act;
    return with_float_type(op.gate_up_proj.format, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kVector<T>;
        const bool vectors = op.hidden_size % V == 0 && is_aligned(op.gate_up_proj.data);
        auto kernel =
            vectors ? experts_gate_up_act_kernel<T, V, leaves_out> : experts_gate_up_act_kernel<T, 1, leaves_out>;
        const dim3 grid(static_cast<unsigned>(ceil_div(op.expert_size, kChannels)),
                        static_cast<unsigned>(op.num_pairs));
        const auto bytes = static_cast<size_t>(ceil_div(op.hidden_size, 4) * 4 + kWarps) * sizeof(float);
        return launch_kernel(context, kernel, grid, kThreads, bytes, op, step.ins.row_mask,
                             step.evicts_first ? kEvictFirst : kEvictNormal, context.stamps);
    });
}

}  // namespace

cudaError_t launch_experts_gate_up_act(const Step& step, const LaunchContext& context) {
    return step.ins.experts_gate_up_act.gate_thresholds ? launch_kind<true>(step, context)
                                                        : launch_kind<false>(step, context);
}

}  // namespace skipkernels::cuda
