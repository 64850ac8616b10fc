#include "launcher.h"

#include <algorithm>
#include <string>

#include "../checks.h"

namespace skipkernels::cuda {

namespace {

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

int64_t weight_size(const Instruction& ins) { return ins.weight_dtype == WeightDtype::fp32 ? 4 : 2; }

const Instruction* find_next(const std::vector<Instruction>& program, size_t from, OpCode op) {
    for (size_t i = from; i < program.size(); ++i) {
        if (program[i].op == op) return &program[i];
    }
    return nullptr;
}

// What the attention at `index` may bring into the cache for those after it: o_proj, which always runs, then this
// layer's FFN where a row wants it, else what follows the FFN. The decision is known before the attention starts.
Prefetch plan_prefetch(const std::vector<Instruction>& program, size_t index, int64_t max_bytes) {
    Prefetch plan{};
    plan.max_bytes = max_bytes;
    if (const Instruction* ins = find_next(program, index, OpCode::o_proj_add)) {
        const OProjAdd& op = ins->o_proj_add;
        plan.always = {op.o_proj, op.hidden_size * op.attention_size * weight_size(*ins)};
    }
    if (const Instruction* ins = find_next(program, index, OpCode::gate_up_silu)) {
        const GateUpSilu& op = ins->gate_up_silu;
        plan.run_ffn = ins->when;
        plan.batch_size = ins->num_rows;
        plan.if_run = {op.gate_up_proj, op.gate_up_size * op.hidden_size * weight_size(*ins)};
    }
    if (const Instruction* ins = find_next(program, index, OpCode::qkv_rope_append)) {
        const QkvRopeAppend& op = ins->qkv_rope_append;
        plan.otherwise = {op.qkv_proj, op.qkv_size * op.hidden_size * weight_size(*ins)};
    } else if ((ins = find_next(program, index, OpCode::lm_head))) {
        const LmHead& op = ins->lm_head;
        plan.otherwise = {op.lm_head, op.vocab_size * op.hidden_size * weight_size(*ins)};
    }
    return plan;
}

// Whether the flags of instruction `index` are written for certain when its kernel starts, although the kernel before
// it, and the one before that behind a skip_gate, may still run: see kernels.h.
bool flags_are_settled(const std::vector<Instruction>& program, size_t index) {
    if (index >= 1 && may_write_flags(program[index - 1], program[index])) return false;
    const bool behind_gate = index >= 2 && program[index - 1].op == OpCode::skip_gate;
    return !(behind_gate && may_write_flags(program[index - 2], program[index]));
}

}  // namespace

Launcher::Launcher(const std::vector<Instruction>& program, int device, int64_t max_prefetch_bytes) : device_(device) {
    const OnDevice on(device_);
    num_sms_ = attribute(cudaDevAttrMultiProcessorCount, device_);
    has_programmatic_launch_ = attribute(cudaDevAttrComputeCapabilityMajor, device_) >= 9;
    // by default half of the second-level cache: what is prefetched must still be there when it is read
    if (max_prefetch_bytes < 0) max_prefetch_bytes = attribute(cudaDevAttrL2CacheSize, device_) / 2;
    int64_t arrivals = 0, scratch = 0;
    for (size_t i = 0; i < program.size(); ++i) {
        cuda::check(program[i]);
        Step step{program[i], {}, flags_are_settled(program, i), nullptr, nullptr};
        if (step.ins.op == OpCode::decode_attention) step.prefetch = plan_prefetch(program, i, max_prefetch_bytes);
        steps_.push_back(step);
        arrivals = std::max(arrivals, num_arrivals(step.ins));
        scratch = std::max(scratch, scratch_floats(step.ins));
    }
    arrivals_ = allocate(arrivals * sizeof(int32_t));
    if (arrivals) check(cudaMemset(arrivals_.get(), 0, arrivals * sizeof(int32_t)), "cudaMemset");
    // a memset is asynchronous, and the streams of later launches need not be ordered behind it
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    scratch_ = allocate(scratch * sizeof(float));
    for (Step& step : steps_) {
        step.arrivals = static_cast<int32_t*>(arrivals_.get());
        step.scratch = static_cast<float*>(scratch_.get());
    }
}

void Launcher::launch(int64_t index, cudaStream_t stream, bool programmatic) const {
    skipkernels::check(index >= 0 && index < size(), "instruction ", index, " is outside 0..", size() - 1);
    const OnDevice on(device_);
    const Step& step = steps_[static_cast<size_t>(index)];
    const LaunchContext context{stream, num_sms_, programmatic && has_programmatic_launch_};
    const std::string_view name = kInstructionSet[static_cast<size_t>(step.ins.op)].name;
    check(cuda::launch(step, context), std::string(name).c_str());
}

}  // namespace skipkernels::cuda
