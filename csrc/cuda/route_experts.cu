// router_logits (rows, experts) = router (experts, hidden) @ rms_norm(hidden_states) + router_bias, then each row's
// experts and their shares, and the list of choices by expert.
//
// Two kernels: the projection, and one block that chooses and lists, since everybody behind it waits for the whole
// list. A warp chooses for a row; then a thread has an expert and looks through all choices.
#include "linear_kernel.cuh"
#include "ops.h"
#include "wanted.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kNone = 0x7fffffff;

struct StoreRouterLogits {
    static constexpr bool kNormed = true, kFinishesTiles = false, kHasExtraBlock = false;
    struct Early {};
    RouteExperts op;

    __device__ Tile tile(int index) const { return tile_of_neighbours(index, op.num_experts); }
    __device__ Early early(int, int, int) const { return {}; }
    __device__ void touch(int, int, int) const {}
    __device__ void operator()(int index, int row, int r, float value, Early) const {
        if (row < 0 || !tile(index).has(r)) return;
        const int64_t expert = int64_t{index} * kTileRows + r;
        op.router_logits[row * op.num_experts + expert] = op.router_bias ? value + op.router_bias[expert] : value;
    }
};

struct Choice {
    float logit;
    int expert;

    // Larger logits come first, and of equal ones the lower expert.
    __device__ bool before(const Choice& other) const {
        return logit > other.logit || (logit == other.logit && expert < other.expert);
    }
};

// The first of a row's experts behind `last`, by a warp; its expert is kNone where no logit is a number.
__device__ Choice next_choice(const float* logits, int num_experts, const Choice& last) {
    Choice best{-INFINITY, kNone};
    for (int expert = static_cast<int>(threadIdx.x) % 32; expert < num_experts; expert += 32) {
        const Choice own{logits[expert], expert};
        if (last.before(own) && own.before(best)) best = own;
    }
    for (int lanes = 16; lanes; lanes /= 2) {
        const Choice other{__shfl_xor_sync(kAllLanes, best.logit, lanes),
                           __shfl_xor_sync(kAllLanes, best.expert, lanes)};
        if (other.before(best)) best = other;
    }
    return best;
}

// expert_ids and expert_weights of a row, by a warp
__device__ void choose(const RouteExperts& op, int64_t row) {
    const int lane = static_cast<int>(threadIdx.x) % 32, num_experts = static_cast<int>(op.num_experts);
    const float* logits = op.router_logits + row * num_experts;
    int32_t* ids = op.expert_ids + row * op.experts_per_token;
    float* weights = op.expert_weights + row * op.experts_per_token;
    float most = -INFINITY, all = 0.0f, chosen = 0.0f;
    for (int expert = lane; expert < num_experts; expert += 32) most = fmaxf(most, logits[expert]);
    most = warp_max(most);
    for (int expert = lane; expert < num_experts; expert += 32) all += expf(logits[expert] - most);
    all = warp_sum(all);
    Choice last{INFINITY, -1};
    for (int c = 0; c < op.experts_per_token; ++c) {
        last = next_choice(logits, num_experts, last);
        const int expert = last.expert == kNone ? c : last.expert;
        const float share = expf(logits[expert] - most) / all;
        chosen += share;
        if (lane == 0) ids[c] = expert, weights[c] = share;
    }
    if (!op.norm_topk_prob || lane != 0) return;
    for (int c = 0; c < op.experts_per_token; ++c) weights[c] /= chosen;
}

// use(pair) for every choice of `expert`, in ascending order
template <class Use>
__device__ void for_choices(const RouteExperts& op, const Wanted& wanted, int expert, Use use) {
    const int choices = static_cast<int>(op.experts_per_token);
    for (int row = 0; row < wanted.num_rows; ++row) {
        for (int c = 0; wanted.row_mask[row] && c < choices; ++c) {
            if (op.expert_ids[row * choices + c] == expert) use(row * choices + c);
        }
    }
}

__global__ void __launch_bounds__(kThreads, 1)  // without the 1, ptxas keeps to 32 registers and spills
    choose_experts_kernel(const __grid_constant__ RouteExperts op, const __grid_constant__ Wanted wanted) {
    const Clock clock(wanted.stamps);
    if (!wanted.wait(clock)) return;
    const int thread = static_cast<int>(threadIdx.x), num_experts = static_cast<int>(op.num_experts);
    for (int row = thread / 32; row < wanted.num_rows; row += kWarps) {
        if (wanted.row_mask[row]) choose(op, row);
    }
    __syncthreads();
    auto* counts = reinterpret_cast<int*>(ptx::shared_memory());
    for (int expert = thread; expert < num_experts; expert += kThreads) {
        int count = 0;
        for_choices(op, wanted, expert, [&](int) { ++count; });
        counts[expert] = count;
    }
    __syncthreads();
    if (thread == 0) {
        int before = 0, read = 0;
        for (int expert = 0; expert < num_experts; ++expert) {
            op.expert_begins[expert] = before;
            before += counts[expert], read += counts[expert] > 0;
        }
        op.expert_begins[num_experts] = before;
        op.experts_read[op.layer] += read;
    }
    __syncthreads();
    for (int expert = thread; expert < num_experts; expert += kThreads) {
        int at = op.expert_begins[expert];
        for_choices(op, wanted, expert, [&](int pair) { op.expert_pairs[at++] = pair; });
    }
}

}  // namespace

cudaError_t launch_route_experts(const Step& step, const LaunchContext& context) {
    const RouteExperts& op = step.ins.route_experts;
    const cudaError_t projected = with_float_type(op.router.format, [&](auto type) {
        const auto in = make_linear<decltype(type)>(step, op.router.data, op.hidden_states, op.hidden_size,
                                                    ceil_div(op.num_experts, kTileRows), op.post_attention_layernorm,
                                                    op.rms_norm_eps);
        return launch_linear(in, StoreRouterLogits{op}, context);
    });
    if (projected != cudaSuccess) return projected;
    return launch_kernel(context, choose_experts_kernel, 1u, kThreads,
                         static_cast<size_t>(op.num_experts) * sizeof(int), op, Wanted(step, context));
}

}  // namespace skipkernels::cuda
