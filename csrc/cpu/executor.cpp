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

// Floats of Scratch::x an instruction needs.
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

// Floats of Scratch::head an instruction needs.
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

Executor::Executor(std::vector<Instruction> program, const int32_t* active, int64_t batch_size, int num_threads,
                   const std::string& isa)
    : program_(std::move(program)),
      active_(active),
      batch_size_(batch_size),
      kernels_(select_kernels(isa)),
      pool_(num_threads),
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

// Where the replay stands. Written by one thread at a time: the one that completed an instruction.
struct Executor::Loop {
    const size_t begin, end;  // the instructions of a step
    const int64_t max_steps;
    const std::function<bool()>* const keep_going;  // null for a single pass that is no step
    size_t at = begin;
    std::vector<double> step_seconds{};
    Clock::time_point step_started{}, instruction_started{};
    std::atomic<bool> finished{false};
};

void Executor::set_profiling(bool on) {
    profiling_ = on;
    std::fill(seconds_.begin(), seconds_.end(), 0.0);
}

bool Executor::any_active() const {
    return std::any_of(active_, active_ + batch_size_, [](int32_t flag) { return flag != 0; });
}

std::vector<double> Executor::run(int64_t max_steps, const std::function<bool()>& keep_going) {
    Loop loop{0, program_.size(), max_steps, &keep_going};
    if (max_steps > 0 && any_active()) replay(loop);
    return std::move(loop.step_seconds);
}

void Executor::run_instruction(int64_t index) {
    check(index >= 0 && index < size(), "instruction ", index, " is outside 0..", size() - 1);
    const auto at = static_cast<size_t>(index);
    Loop loop{at, at + 1, 1, nullptr};
    replay(loop);
}

void Executor::replay(Loop& loop) {
    loop.step_started = Clock::now();
    if (find_work(loop)) pool_.run([&](int thread) { help(loop, thread); });
}

// Walks on to the next instruction that is worth sharing and publishes it; false at the end of the replay. On the way
// it passes over what no row wants (a skipped FFN costs this check), runs short instructions itself, and ends steps.
bool Executor::find_work(Loop& loop) {
    for (;; ++loop.at) {
        if (loop.at == loop.end) {
            if (loop.keep_going) loop.step_seconds.push_back(seconds_since(loop.step_started));
            const bool more = loop.keep_going && static_cast<int64_t>(loop.step_seconds.size()) < loop.max_steps &&
                              any_active() && (*loop.keep_going)();
            if (!more) {
                loop.finished.store(true, std::memory_order_release);
                return false;
            }
            loop.at = loop.begin;
            loop.step_started = Clock::now();
        }
        const Instruction& ins = program_[loop.at];
        if (profiling_) loop.instruction_started = Clock::now();
        if (count_rows(ins) == 0) continue;
        const int64_t tasks = kernel(ins).num_tasks(ins);
        if (tasks > 1) {
            at_.store(loop.at, std::memory_order_relaxed);
            num_tasks_.store(tasks, std::memory_order_relaxed);
            completed_.store(0, std::memory_order_relaxed);
            const uint64_t round = (unclaimed_.load(std::memory_order_relaxed) >> 32) + 1;
            unclaimed_.store(round << 32 | static_cast<uint64_t>(tasks), std::memory_order_release);
            return true;
        }
        kernel(ins).prepare(ins, scratch_[0]);  // nobody else holds a task, so nobody else uses any scratch
        kernel(ins).run(ins, 0, 1, scratch_[0]);
        if (profiling_) seconds_[loop.at] += seconds_since(loop.instruction_started);
    }
}

// Takes tasks until the replay is finished. No thread waits for one that has not taken any: on a busy machine, whoever
// has a processor does the work.
void Executor::help(Loop& loop, int thread) {
    uint64_t prepared_round = 0;  // rounds start at 1
    Backoff backoff;
    while (!loop.finished.load(std::memory_order_acquire)) {
        uint64_t seen = unclaimed_.load(std::memory_order_acquire);
        const auto left = static_cast<int64_t>(seen & 0xffffffffu);
        if (left == 0) {
            backoff.wait();
            continue;
        }
        // As long as tasks are unclaimed nothing else is published, so these two belong to `seen` if the exchange
        // holds.
        const Instruction& ins = program_[at_.load(std::memory_order_relaxed)];
        const int64_t num_tasks = num_tasks_.load(std::memory_order_relaxed), begin = num_tasks - left;
        // half of an even share of what is left, so that threads of unequal speed finish together
        const int64_t count = std::max<int64_t>(1, left / (2 * pool_.size()));
        if (!unclaimed_.compare_exchange_weak(seen, seen - static_cast<uint64_t>(count), std::memory_order_acq_rel))
            continue;
        backoff.reset();
        const Kernel& ops = kernel(ins);
        if (prepared_round != seen >> 32) {
            ops.prepare(ins, scratch_[thread]);
            prepared_round = seen >> 32;
        }
        ops.run(ins, begin, begin + count, scratch_[thread]);
        if (completed_.fetch_add(count, std::memory_order_acq_rel) + count == num_tasks) {
            if (profiling_) seconds_[loop.at] += seconds_since(loop.instruction_started);
            ++loop.at;
            find_work(loop);
        }
    }
}

}  // namespace skipkernels::cpu
