#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>

#include "../checks.h"

namespace skipkernels::cpu {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::vector<const KernelSet*> usable_kernels() {
    std::vector<const KernelSet*> sets;
#if SKIPKERNELS_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        sets.push_back(&avx512_kernels());
    }
#endif
#if SKIPKERNELS_HAVE_AVX2
    // every AVX2 processor has F16C
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2_kernels());
#endif
    sets.push_back(&generic_kernels());
    return sets;
}

int64_t padded(int64_t k) { return (k + kMaxVecWidth - 1) / kMaxVecWidth * kMaxVecWidth; }

std::unique_ptr<float[], void (*)(void*)> allocate_floats(size_t count) {
    void* memory = std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return {static_cast<float*>(memory), std::free};
}

}  // namespace

const KernelSet& select_kernels(const std::string& isa) {
    const auto sets = usable_kernels();
    if (isa == "auto") return *sets.front();
    std::string names;
    for (const KernelSet* set : sets) {
        if (isa == set->isa) return *set;
        names += std::string(names.empty() ? "" : ", ") + set->isa;
    }
    fail("instruction set '", isa, "' is not usable on this processor; usable: auto, ", names);
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const KernelSet* set : usable_kernels()) names.emplace_back(set->isa);
    return names;
}

size_t packed_floats(const Instruction& ins) {
    switch (ins.op) {
        case OpCode::qkv_rope_append:
            return ins.batch_size * padded(ins.qkv_rope_append.hidden_size);
        case OpCode::o_proj_add:
            return ins.batch_size * padded(ins.o_proj_add.attention_size);
        case OpCode::gate_up_silu:
            return ins.batch_size * padded(ins.gate_up_silu.hidden_size);
        case OpCode::down_proj_add:
            return ins.batch_size * padded(ins.down_proj_add.intermediate_size);
        case OpCode::lm_head:
            return ins.batch_size * padded(ins.lm_head.hidden_size);
        default:
            return 0;
    }
}

size_t head_floats(const Instruction& ins) {
    switch (ins.op) {
        case OpCode::qkv_rope_append:
            return ins.batch_size * ins.qkv_rope_append.head_dim;
        case OpCode::decode_attention: {
            const DecodeAttention& op = ins.decode_attention;
            return op.num_attention_heads / op.num_key_value_heads * op.kv_split;
        }
        default:
            return 0;
    }
}

Executor::Executor(std::vector<Instruction> program, const int32_t* active, int64_t batch_size, int num_threads,
                   const std::string& isa)
    : program_(std::move(program)),
      active_(active),
      batch_size_(batch_size),
      kernels_(select_kernels(isa)),
      pool_(num_threads),
      barrier_(num_threads),
      seconds_(program_.size(), 0.0) {
    size_t packed = 0, head = 0, arrivals = 0;
    for (const Instruction& ins : program_) {
        packed = std::max(packed, packed_floats(ins));
        head = std::max(head, head_floats(ins));
        if (ins.op == OpCode::decode_attention) {
            arrivals = std::max<size_t>(arrivals, batch_size * ins.decode_attention.num_key_value_heads);
        }
        check(ins.op != OpCode::down_proj_add || ins.down_proj_add.rows_per_partial == kPanelRows,
              "down_proj_add: the CPU kernels sum ", kPanelRows, " rows per partial, the program wants ",
              ins.op == OpCode::down_proj_add ? ins.down_proj_add.rows_per_partial : 0);
    }
    arrivals_.reset(new std::atomic<int32_t>[arrivals]());
    constexpr size_t kAccumulators = kPanelRows * kMaxTile * kMaxVecWidth, kPanel = 2 * kMaxBatch * kPanelRows;
    for (int thread = 0; thread < num_threads; ++thread) {
        memory_.push_back(allocate_floats(packed + kAccumulators + kPanel + head));
        float* at = memory_.back().get();
        Scratch scratch{};
        scratch.x = at;
        scratch.accumulators = at + packed;
        scratch.panel = scratch.accumulators + kAccumulators;
        scratch.head = scratch.panel + kPanel;
        scratch.arrivals = arrivals_.get();
        scratch_.push_back(scratch);
    }
}

// Where the replay stands. Written by one thread at a time, between a barrier's last arrival and its release.
struct Executor::Loop {
    size_t at;   // the instruction all threads work on
    size_t end;  // one past the last
    int64_t max_steps;
    const std::function<bool()>* keep_going;
    std::vector<double> step_seconds;
    Clock::time_point step_started, instruction_started;
    bool finished = false;
};

void Executor::set_profiling(bool on) {
    profiling_ = on;
    std::fill(seconds_.begin(), seconds_.end(), 0.0);
}

bool Executor::any_active() const {
    return std::any_of(active_, active_ + batch_size_, [](int32_t flag) { return flag != 0; });
}

std::vector<double> Executor::run(int64_t max_steps, const std::function<bool()>& keep_going) {
    Loop loop{0, program_.size(), max_steps, &keep_going, {}, {}, {}, false};
    if (max_steps > 0 && any_active()) replay(loop);
    return loop.step_seconds;
}

void Executor::run_instruction(int64_t index) {
    check(index >= 0 && index < size(), "instruction ", index, " is outside 0..", size() - 1);
    const auto at = static_cast<size_t>(index);
    Loop loop{at, at + 1, 1, nullptr, {}, {}, {}, false};
    replay(loop);
}

// All threads walk the program in lockstep. The last to finish an instruction finds the next that needs all of them:
// it passes over what no row wants (a skipped FFN costs this check), runs short instructions itself, and ends steps.
void Executor::replay(Loop& loop) {
    const size_t begin = loop.at;

    auto find_work = [&] {
        for (;; ++loop.at) {
            if (loop.at == loop.end) {
                if (loop.keep_going) loop.step_seconds.push_back(seconds_since(loop.step_started));
                const bool more = loop.keep_going && static_cast<int64_t>(loop.step_seconds.size()) < loop.max_steps &&
                                  any_active() && (*loop.keep_going)();
                if (!more) {
                    loop.finished = true;
                    return;
                }
                loop.at = begin;
                loop.step_started = Clock::now();
            }
            const Instruction& ins = program_[loop.at];
            if (profiling_) loop.instruction_started = Clock::now();
            if (count_rows(ins) == 0) continue;
            num_tasks_ = kernel(ins).num_tasks(ins);
            if (num_tasks_ > 1) {
                next_task_.store(0, std::memory_order_relaxed);
                return;
            }
            kernel(ins).prepare(ins, scratch_[0]);
            kernel(ins).run(ins, 0, 1, scratch_[0]);
            if (profiling_) seconds_[loop.at] += seconds_since(loop.instruction_started);
        }
    };
    auto finish = [&] {
        if (profiling_) seconds_[loop.at] += seconds_since(loop.instruction_started);
        ++loop.at;
        find_work();
    };

    loop.step_started = Clock::now();
    find_work();
    if (loop.finished) return;
    pool_.run([&](int thread) {
        while (!loop.finished) {
            work(program_[loop.at], thread);
            barrier_.arrive(finish);
        }
    });
}

void Executor::work(const Instruction& ins, int thread) {
    int64_t begin, end;
    if (!claim(begin, end)) return;
    const Kernel& ops = kernel(ins);
    ops.prepare(ins, scratch_[thread]);
    do {
        ops.run(ins, begin, end, scratch_[thread]);
    } while (claim(begin, end));
}

// Takes the next tasks: half of an even share of what is left, so that threads of unequal speed finish together.
bool Executor::claim(int64_t& begin, int64_t& end) {
    begin = next_task_.load(std::memory_order_relaxed);
    do {
        if (begin >= num_tasks_) return false;
        end = begin + std::max<int64_t>(1, (num_tasks_ - begin) / (2 * pool_.size()));
    } while (!next_task_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
}

}  // namespace skipkernels::cpu
