// router_logits (rows, experts) = router (experts, hidden) @ rms_norm(hidden_states) + router_bias; whoever completes
// the last panel chooses each row's experts and lists the choices by expert.
#include "experts.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t route_experts_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.route_experts.router, ins.route_experts.num_experts);
}

void route_experts_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const RouteExperts& op = ins.route_experts;
    pack_rms_norm(op.router, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps, begin, end,
                  s);
}

void route_experts_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const RouteExperts& op = ins.route_experts;
    for_tasks(op.router, op.num_experts, op.hidden_size, begin, end, s, [&](int64_t first, int height) {
        for (int i = 0; i < s.num_rows; ++i) {
            float* out = op.router_logits + s.rows[i] * op.num_experts + first;
            const float* logits = s.panel + i * cpu::kPanelRows;
            for (int r = 0; r < height; ++r) out[r] = logits[r] + (op.router_bias ? op.router_bias[first + r] : 0.0f);
        }
    });
    const auto done = static_cast<int32_t>(end - begin);
    std::atomic<int32_t>& arrived = *s.attention.arrivals;
    if (arrived.fetch_add(done, std::memory_order_acq_rel) + done < route_experts_tasks(ins, s)) return;
    arrived.store(0, std::memory_order_relaxed);
    cpu::choose_experts(op, s);
}

}  // namespace skipkernels::SKIPKERNELS_ISA
