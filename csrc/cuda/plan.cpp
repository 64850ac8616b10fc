#include "plan.h"

#include <algorithm>

#include "planes.h"

namespace skipkernels::cuda {

namespace {

WeightRange range_of(const Matrix& matrix, int64_t columns) {
    const MatrixPart& part = matrix.parts[0];
    if (!is_float(part.format)) return {part.data, PlaneOffsets(part.format, part.rows, columns).bytes};
    return {part.data, part.rows * columns * (part.format == Format::f32 ? 4 : 2)};
}

const Instruction* find_next(const std::vector<Instruction>& program, size_t from, OpCode op) {
    for (size_t i = from; i < program.size(); ++i) {
        if (program[i].op == op) return &program[i];
    }
    return nullptr;
}

WeightRange qkv_weights(const Instruction& ins) {
    const QkvRopeAppend& op = ins.qkv_rope_append;
    return range_of(op.qkv_proj, op.hidden_size);
}
WeightRange o_proj_weights(const Instruction& ins) {
    const OProjAdd& op = ins.o_proj_add;
    return range_of(op.o_proj, op.attention_size);
}

// What the attention at `index` may bring into the cache for those after it: o_proj, which always runs, then this
// layer's FFN where a row wants it, else what follows the FFN. The decision is known before the attention starts.
Prefetch prefetch_of_attention(const std::vector<Instruction>& program, size_t index) {
    Prefetch plan{};
    if (const Instruction* ins = find_next(program, index, OpCode::o_proj_add)) plan.always = o_proj_weights(*ins);
    const Instruction* ffn = find_next(program, index, OpCode::gate_up_act);
    if (!ffn) ffn = find_next(program, index, OpCode::gate_proj_act);
    const Instruction* router = find_next(program, index, OpCode::route_experts);
    if (router && ffn && router < ffn) ffn = nullptr;  // of a later layer; which experts this one reads is not known
    if (ffn) {
        plan.run_ffn = ffn->row_mask;
        plan.num_rows = ffn->num_rows;
        plan.if_run = ffn->op == OpCode::gate_up_act
                          ? range_of(ffn->gate_up_act.gate_up_proj, ffn->gate_up_act.hidden_size)
                          : range_of(ffn->gate_proj_act.gate_proj, ffn->gate_proj_act.hidden_size);
    }
    if (const Instruction* ins = find_next(program, index, OpCode::qkv_rope_append)) {
        plan.otherwise = qkv_weights(*ins);
    } else if ((ins = find_next(program, index, OpCode::lm_head))) {
        const LmHead& op = ins->lm_head;
        plan.otherwise = range_of(op.lm_head, op.hidden_size);
    }
    return plan;
}

// What the next step begins with: the end of this one leaves the memory idle.
Prefetch prefetch_of_sample(const std::vector<Instruction>& program) {
    Prefetch plan{};
    if (const Instruction* ins = find_next(program, 0, OpCode::qkv_rope_append)) plan.always = qkv_weights(*ins);
    if (const Instruction* ins = find_next(program, 0, OpCode::o_proj_add)) plan.otherwise = o_proj_weights(*ins);
    return plan;
}

bool looks_for_rows_first(OpCode op) {
    return op == OpCode::qkv_rope_append || op == OpCode::o_proj_add || op == OpCode::gate_up_act ||
           op == OpCode::down_proj_add || op == OpCode::gate_proj_act || op == OpCode::select_neurons ||
           op == OpCode::up_proj_mul || op == OpCode::down_proj_neurons_add || op == OpCode::lm_head;
}

// Whether the kernel after that of `ins` may start although the one before it still runs.
bool may_trigger_early(const Instruction& ins, const Options& options) {
    return ins.op == OpCode::skip_gate || (options.early_trigger && looks_for_rows_first(ins.op));
}

// Whether the flags of instruction `index` are written for certain when its kernel starts, although the kernel before
// it may still run, and that one's predecessors where it triggers early: see kernels.h.
bool flags_are_settled(const std::vector<Instruction>& program, size_t index, const Options& options) {
    for (size_t i = index; i-- > 0;) {
        if (may_write_flags(program[i], program[index])) return false;
        if (!may_trigger_early(program[i], options)) return true;
    }
    return true;
}

}  // namespace

std::vector<Step> plan_steps(const std::vector<Instruction>& program, const Options& options,
                             int64_t max_prefetch_bytes) {
    std::vector<Step> steps;
    for (size_t i = 0; i < program.size(); ++i) {
        Step step{};
        step.ins = program[i];
        step.flags_are_settled = flags_are_settled(program, i, options);
        step.triggers_early = options.early_trigger && step.flags_are_settled;
        step.evicts_first = options.evict_first;
        step.touches_settled = options.touch_settled;
        const bool qkv_follows = i + 1 < program.size() && program[i + 1].op == OpCode::qkv_rope_append;
        step.is_taken_along = options.gate_beside_qkv && step.ins.op == OpCode::skip_gate && qkv_follows &&
                              program[i + 1].row_mask == step.ins.row_mask;
        step.takes_gate_along = i > 0 && steps.back().is_taken_along;
        if (step.takes_gate_along) step.gate = program[i - 1].skip_gate;
        if (step.ins.op == OpCode::decode_attention) {
            step.prefetch = prefetch_of_attention(program, i);
            step.prefetch.max_bytes = max_prefetch_bytes;
            // the kernel before it may hold the gate, and so the decision what to prefetch
            step.prefetches_early = !options.late_prefetch && !(i > 0 && steps.back().takes_gate_along);
        }
        if (step.ins.op == OpCode::sample && options.prefetch_first_layer) {
            step.prefetch = prefetch_of_sample(program);
            step.prefetch.max_bytes = max_prefetch_bytes;
        }
        steps.push_back(step);
    }
    return steps;
}

}  // namespace skipkernels::cuda
