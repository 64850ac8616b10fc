#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <utility>

#include "../checks.h"
#include "blocks.h"
#if SKIPKERNELS_HAVE_AVX_VNNI
#    include <cpuid.h>
#endif

namespace skipkernels::cpu {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

#if SKIPKERNELS_HAVE_AVX_VNNI
// GCC 12 does not know the name: leaf 7, subleaf 1, bit 4 of EAX. The registers it needs are AVX2's.
bool has_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

#if SKIPKERNELS_HAVE_AVX512 || SKIPKERNELS_HAVE_AVX512_VNNI || SKIPKERNELS_HAVE_AVX512_BF16
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

std::vector<const KernelSet*> usable_kernels() {
    std::vector<const KernelSet*> sets;
#if SKIPKERNELS_HAVE_AVX512_BF16
    if (has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        sets.push_back(&avx512_bf16_kernels());
#endif
#if SKIPKERNELS_HAVE_AVX512_VNNI
    if (has_avx512() && __builtin_cpu_supports("avx512vnni")) sets.push_back(&avx512_vnni_kernels());
#endif
#if SKIPKERNELS_HAVE_AVX512
    if (has_avx512()) sets.push_back(&avx512_kernels());
#endif
#if SKIPKERNELS_HAVE_AVX_VNNI
    if (has_avx_vnni()) sets.push_back(&avx_vnni_kernels());
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

// Columns of the matrix an instruction multiplies with, padded; 0 where it has none.
size_t packed_columns(const Instruction& ins) {
    switch (ins.op) {
        case OpCode::qkv_rope_append:
            return padded(ins.qkv_rope_append.hidden_size);
        case OpCode::o_proj_add:
            return padded(ins.o_proj_add.attention_size);
        case OpCode::gate_up_act:
            return padded(ins.gate_up_act.hidden_size);
        case OpCode::down_proj_add:
            return padded(ins.down_proj_add.intermediate_size);
        case OpCode::route_experts:
            return padded(ins.route_experts.hidden_size);
        case OpCode::experts_gate_up_act:
            return padded(ins.experts_gate_up_act.hidden_size);
        case OpCode::experts_down_proj_add:
            return ins.experts_down_proj_add.experts_per_token * padded(ins.experts_down_proj_add.expert_size);
        case OpCode::experts_down_proj_neurons_add: {
            const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
            return op.experts_per_token * padded(op.expert_size);
        }
        case OpCode::gate_proj_act:
            return padded(ins.gate_proj_act.hidden_size);
        case OpCode::up_proj_mul:
            return padded(ins.up_proj_mul.hidden_size);
        case OpCode::down_proj_neurons_add:
            return padded(ins.down_proj_neurons_add.intermediate_size);
        case OpCode::lm_head:
            return padded(ins.lm_head.hidden_size);
        default:
            return 0;
    }
}

int64_t rows_per_partial(const Instruction& ins) {
    switch (ins.op) {
        case OpCode::down_proj_add:
            return ins.down_proj_add.rows_per_partial;
        case OpCode::experts_down_proj_add:
            return ins.experts_down_proj_add.rows_per_partial;
        case OpCode::experts_down_proj_neurons_add:
            return ins.experts_down_proj_neurons_add.rows_per_partial;
        case OpCode::down_proj_neurons_add:
            return ins.down_proj_neurons_add.rows_per_partial;
        case OpCode::branch_add:
            return ins.branch_add.rows_per_partial;
        default:
            return kPanelRows;
    }
}

// A chunk must not cut what is read together: a block of quantised weights, or a pair of bf16 rows.
template <class Op>
void check_neuron_chunk(const char* name, const Op& op) {
    const int64_t step = is_float(op.down_proj.format) ? 2 : kBlockColumns;
    check(op.neuron_chunk > 0 && op.neuron_chunk % step == 0, name, ": neuron_chunk must be a multiple of ", step,
          " on the CPU, got ", op.neuron_chunk);
}

// Floats of the group that rows of w are put into where they lie in one piece each.
size_t group_floats(const Matrix& w, int64_t columns) {
    size_t floats = 0;
    for (int i = 0; i < w.num_parts; ++i) {
        if (w.parts[i].layout != Layout::single_rows) continue;
        const GroupLayout layout(block_traits(w.parts[i].format), columns);
        const int64_t bytes = std::max(layout.bytes, layout.codes + row_dots_bytes(columns));
        floats = std::max<size_t>(floats, bytes / sizeof(float));
    }
    return floats;
}

// What a scratch must hold for the instructions it has seen. All but rows and arrivals in floats.
struct Needs {
    size_t rows = 0, own_x = 0, shared_x = 0, panel = 0, op_scratch = 0, group = 0, neuron_sums = 0;
    size_t arrivals = 0, queries = 0, scores_stride = 0, padded_head = 0;  // of attention

    static size_t num_chunks(int64_t neurons, int64_t chunk) { return (neurons + chunk - 1) / chunk; }

    // a step of weights and its number for every neuron, a chunk's units, its end, and a panel of every row
    static size_t neurons_floats(int64_t neurons, int64_t chunk, size_t num_rows) {
        const size_t step = kNeuronStep, unit = 6;
        return (neurons + 1) * (step + 1) + (chunk + kNeuronsAhead) * unit + 2 * num_chunks(neurons, chunk) +
               num_rows * kNeuronPanel;
    }

    // the sums of chunks, each of `count` rows
    void add_sums(int64_t neurons, int64_t chunk, size_t count, int64_t hidden_size) {
        const size_t hidden = (hidden_size + kHiddenStep - 1) / kHiddenStep * kHiddenStep;
        neuron_sums = std::max(neuron_sums, num_chunks(neurons, chunk) * count * hidden);
        arrivals = std::max<size_t>(arrivals, 1);
    }

    void add(const Instruction& ins) {
        const auto num_rows = static_cast<size_t>(ins.num_rows);
        rows = std::max(rows, num_rows);
        if (const size_t columns = packed_columns(ins)) {
            own_x = std::max(own_x, std::min<size_t>(num_rows, kFewRows) * columns);
            panel = std::max(panel, kBlockPanels * num_rows * kPanelRows);
            if (num_rows > kFewRows) shared_x = std::max(shared_x, num_rows * columns);
        }
        if (ins.op == OpCode::qkv_rope_append)
            op_scratch = std::max(op_scratch, num_rows * ins.qkv_rope_append.head_dim);
        if (ins.op == OpCode::route_experts) arrivals = std::max<size_t>(arrivals, 1);
        if (ins.op == OpCode::experts_gate_up_act)  // an expert's rows, packed, and their list
            op_scratch = std::max<size_t>(op_scratch, num_rows * (padded(ins.experts_gate_up_act.hidden_size) + 1));
        if (ins.op == OpCode::experts_down_proj_add)  // where each row stands in the list, and the chosen experts
            op_scratch = std::max<size_t>(op_scratch, num_rows + ins.experts_down_proj_add.num_begins);
        if (ins.op == OpCode::select_neurons)
            op_scratch = std::max<size_t>(op_scratch, ins.select_neurons.intermediate_size);
        if (ins.op == OpCode::gate_up_act)
            group = std::max(group, group_floats(ins.gate_up_act.gate_up_proj, ins.gate_up_act.hidden_size));
        if (ins.op == OpCode::up_proj_mul)
            group = std::max(group, group_floats(ins.up_proj_mul.up_proj, ins.up_proj_mul.hidden_size));
        if (ins.op == OpCode::down_proj_neurons_add) {
            const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
            // of blocks a panel's sums of every row, of a chunk and of all chunks
            if (!is_float(op.down_proj.format)) op_scratch = std::max(op_scratch, 2 * num_rows * kColumnsPanel);
            op_scratch = std::max(op_scratch, neurons_floats(op.intermediate_size, op.neuron_chunk, num_rows));
            add_sums(op.intermediate_size, op.neuron_chunk, std::min<size_t>(num_rows, kFewRows), op.hidden_size);
        }
        if (ins.op == OpCode::experts_down_proj_neurons_add) {
            const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
            // also each row's branch and place, and a list of an expert's neurons
            op_scratch = std::max(op_scratch, neurons_floats(op.expert_size, op.neuron_chunk, num_rows) +
                                                  num_rows * (kNeuronPanel + 1) + op.expert_size + kNeuronsAhead);
            add_sums(op.expert_size, op.neuron_chunk, std::min<size_t>(num_rows, kFewRows) * op.experts_per_token,
                     op.hidden_size);
        }
        if (ins.op == OpCode::decode_attention) {
            const DecodeAttention& op = ins.decode_attention;
            const size_t group = op.num_attention_heads / op.num_key_value_heads;
            arrivals = std::max<size_t>(arrivals, num_rows * op.num_key_value_heads);
            queries = std::max(queries, std::max<size_t>(group, kAttentionQueries));
            scores_stride = std::max<size_t>(scores_stride, padded(op.kv_split_size) + kAttentionBlock);
            padded_head = std::max<size_t>(padded_head, padded(op.head_dim));
        }
    }
};

// Cuts a thread's memory into pieces that start on a cache line.
class Cutter {
  public:
    explicit Cutter(float* memory) : at_(memory) {}
    static size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }
    float* take(size_t floats) { return std::exchange(at_, at_ + rounded(floats)); }

  private:
    float* at_;
};

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

Executor::Executor(std::vector<Instruction> program, const int32_t* active, int64_t num_rows, int num_threads,
                   const std::string& isa)
    : program_(std::move(program)),
      active_(active),
      active_rows_(num_rows),
      kernels_(select_kernels(isa)),
      pool_(num_threads),
      seconds_(program_.size(), 0.0) {
    Needs needs;
    for (const Instruction& ins : program_) {
        needs.add(ins);
        check(rows_per_partial(ins) == kPanelRows, "the CPU kernels sum ", kPanelRows,
              " rows per similarity partial, the program wants ", rows_per_partial(ins));
        if (ins.op == OpCode::down_proj_neurons_add)
            check_neuron_chunk("down_proj_neurons_add", ins.down_proj_neurons_add);
        if (ins.op == OpCode::experts_down_proj_neurons_add) {
            const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
            check_neuron_chunk("experts_down_proj_neurons_add", op);
            check(is_float(op.down_proj.format), "experts_down_proj_neurons_add: has no kernel for down_proj in ",
                  kFormatNames[static_cast<size_t>(op.down_proj.format)], "; load the model with dtype bf16");
        }
        if (ins.op == OpCode::experts_gate_up_act && ins.experts_gate_up_act.gate_thresholds) {
            const Format format = ins.experts_gate_up_act.gate_up_proj.format;
            check(is_float(format), "experts_gate_up_act: leaves out no neurons of gate_up_proj in ",
                  kFormatNames[static_cast<size_t>(format)], "; load the model with dtype bf16");
        }
    }
    rows_.resize(needs.rows);
    tile_begins_.resize(needs.rows + 1);
    tiles_.begins = tile_begins_.data();
    arrivals_.reset(new std::atomic<int32_t>[needs.arrivals]());
    memory_.push_back(allocate_floats(needs.shared_x));
    memory_.push_back(allocate_floats(needs.neuron_sums));
    queries_.resize(num_threads * needs.queries);
    const size_t scores = needs.queries * needs.scores_stride, heads = needs.queries * needs.padded_head;
    const size_t arranged = needs.padded_head * kAttentionBlock;
    constexpr size_t kAccumulators = kTilesTogether * kPanelRows * kMaxTile * kMaxVecWidth;
    for (int thread = 0; thread < num_threads; ++thread) {
        size_t floats = 0;
        for (size_t part : {needs.own_x, kAccumulators, needs.panel, needs.panel, needs.op_scratch, needs.group, scores,
                            heads, heads, arranged}) {
            floats += Cutter::rounded(part);
        }
        memory_.push_back(allocate_floats(floats));
        Cutter cutter(memory_.back().get());
        Scratch scratch{};
        scratch.own_x = cutter.take(needs.own_x);
        scratch.shared_x = memory_[0].get();
        scratch.neuron_sums = memory_[1].get();
        scratch.accumulators = cutter.take(kAccumulators);
        scratch.panel = cutter.take(needs.panel);
        scratch.second_panel = cutter.take(needs.panel);
        scratch.op_scratch = cutter.take(needs.op_scratch);
        scratch.group = reinterpret_cast<uint8_t*>(cutter.take(needs.group));
        scratch.rows = rows_.data();
        AttentionScratch& attention = scratch.attention;
        attention.tiles = &tiles_;
        attention.arrivals = arrivals_.get();
        attention.queries = queries_.data() + thread * needs.queries;
        attention.scores = cutter.take(scores);
        attention.scores_stride = static_cast<int64_t>(needs.scores_stride);
        attention.packed_queries = cutter.take(heads);
        attention.outputs = cutter.take(heads);
        attention.arranged = cutter.take(arranged);
        scratch_.push_back(scratch);
    }
}

// Where the replay stands. Written by one thread at a time: the one that completed an instruction.
struct Executor::Loop {
    const size_t begin, end;  // the instructions of a step
    const int64_t max_steps;
    const std::function<bool()>* const keep_going;  // null for a single pass that is no step
    size_t at = begin;
    bool packed = false;  // the instruction's rows, where they are packed for all threads
    std::vector<double> step_seconds{};
    Clock::time_point step_started{}, instruction_started{};
    std::atomic<bool> finished{false};
};

void Executor::set_profiling(bool on) {
    profiling_ = on;
    std::fill(seconds_.begin(), seconds_.end(), 0.0);
}

bool Executor::any_active() const {
    return std::any_of(active_, active_ + active_rows_, [](int32_t flag) { return flag != 0; });
}

std::vector<double> Executor::run(int64_t max_steps, const std::function<bool()>& keep_going) {
    Loop loop{0, program_.size(), max_steps, &keep_going};
    if (max_steps > 0 && any_active()) replay(loop);
    interrupted_.store(false, std::memory_order_relaxed);  // not at the start: an earlier call must not be lost
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
    if (publish_next(loop)) pool_.run([&](int thread) { worker_loop(loop, thread); });
}

void Executor::find_rows(const Instruction& ins) {
    constexpr int64_t kAtOnce = 8;  // most prompt rows are idle in most steps
    int count = 0;
    for (int64_t begin = 0; begin < ins.num_rows; begin += kAtOnce) {
        const int64_t end = std::min(begin + kAtOnce, ins.num_rows);
        int32_t any = 0;
        for (int64_t row = begin; row < end; ++row) any |= ins.row_mask[row];
        if (!any) continue;
        for (int64_t row = begin; row < end; ++row) {
            if (ins.row_mask[row]) rows_[count++] = static_cast<int>(row);
        }
    }
    num_rows_.store(count, std::memory_order_relaxed);
}

void Executor::set_rows(Scratch& scratch) const {
    scratch.num_rows = num_rows_.load(std::memory_order_relaxed);
    scratch.x = scratch.num_rows > kFewRows ? scratch.shared_x : scratch.own_x;
}

void Executor::publish(int64_t tasks) {
    num_tasks_.store(tasks, std::memory_order_relaxed);
    completed_.store(0, std::memory_order_relaxed);
    const uint64_t round = (unclaimed_.load(std::memory_order_relaxed) >> 32) + 1;
    unclaimed_.store(round << 32 | static_cast<uint64_t>(tasks), std::memory_order_release);
}

// Walks on to the next instruction that is worth sharing and publishes it; false at the end of the replay. On the way
// it passes over what no row wants (a skipped FFN costs this check), runs short instructions itself, and ends steps.
// Nobody else holds a task here, so nobody else uses any scratch.
bool Executor::publish_next(Loop& loop) {
    for (;; ++loop.at, loop.packed = false) {
        if (loop.at == loop.end) {
            if (loop.keep_going) loop.step_seconds.push_back(seconds_since(loop.step_started));
            const bool more = loop.keep_going && static_cast<int64_t>(loop.step_seconds.size()) < loop.max_steps &&
                              any_active() && !interrupted_.load(std::memory_order_relaxed) && (*loop.keep_going)();
            if (!more) {
                loop.finished.store(true, std::memory_order_release);
                return false;
            }
            loop.at = loop.begin;
            loop.step_started = Clock::now();
        }
        const Instruction& ins = program_[loop.at];
        const Kernel& ops = kernel(ins);
        Scratch& scratch = scratch_[0];
        if (!loop.packed) {
            if (profiling_) loop.instruction_started = Clock::now();
            find_rows(ins);
            set_rows(scratch);
            if (scratch.num_rows == 0) continue;
        }
        const int64_t tasks = ops.num_tasks(ins, scratch);
        const bool pack = ops.pack && !loop.packed && scratch.num_rows > kFewRows;
        if (tasks > 1) {
            at_.store(loop.at, std::memory_order_relaxed);
            packing_.store(pack, std::memory_order_relaxed);
            publish(pack ? kernels_.num_tiles(scratch.num_rows) : tasks);
            return true;
        }
        if (ops.pack) ops.pack(ins, 0, kernels_.num_tiles(scratch.num_rows), scratch);
        ops.run(ins, 0, 1, scratch);
        if (profiling_) seconds_[loop.at] += seconds_since(loop.instruction_started);
    }
}

// Takes tasks until the replay is finished. No thread waits for one that has not taken any: on a busy machine, whoever
// has a processor does the work.
void Executor::worker_loop(Loop& loop, int thread) {
    Scratch& scratch = scratch_[thread];
    uint64_t prepared_round = 0;  // rounds start at 1
    Backoff backoff;
    while (!loop.finished.load(std::memory_order_acquire)) {
        uint64_t seen = unclaimed_.load(std::memory_order_acquire);
        const auto left = static_cast<int64_t>(seen & 0xffffffffu);
        if (left == 0) {
            backoff.wait();
            continue;
        }
        // As long as tasks are unclaimed nothing else is published, so these three belong to `seen` if the exchange
        // holds.
        const Instruction& ins = program_[at_.load(std::memory_order_relaxed)];
        const int64_t num_tasks = num_tasks_.load(std::memory_order_relaxed), begin = num_tasks - left;
        const bool packing = packing_.load(std::memory_order_relaxed);
        // half of an even share of what is left, so that threads of unequal speed finish together
        const int64_t count = std::max<int64_t>(1, left / (2 * pool_.size()));
        if (!unclaimed_.compare_exchange_weak(seen, seen - static_cast<uint64_t>(count), std::memory_order_acq_rel))
            continue;
        backoff.reset();
        const Kernel& ops = kernel(ins);
        if (prepared_round != seen >> 32) {
            prepared_round = seen >> 32;
            set_rows(scratch);
            if (ops.pack && scratch.num_rows <= kFewRows)
                ops.pack(ins, 0, kernels_.num_tiles(scratch.num_rows), scratch);
        }
        if (packing) {
            ops.pack(ins, static_cast<int>(begin), static_cast<int>(begin + count), scratch);
        } else {
            ops.run(ins, begin, begin + count, scratch);
        }
        if (completed_.fetch_add(count, std::memory_order_acq_rel) + count == num_tasks) {
            loop.packed = packing;
            if (!packing) {
                if (profiling_) seconds_[loop.at] += seconds_since(loop.instruction_started);
                ++loop.at;
            }
            publish_next(loop);
        }
    }
}

}  // namespace skipkernels::cpu
