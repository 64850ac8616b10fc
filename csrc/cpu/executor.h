// Replays a recorded program on the CPU: the whole generation loop runs here, on threads started once.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace skipkernels::cpu {

// The kernel set of an instruction set by name; "auto" is the widest this processor has.
const KernelSet& select_kernels(const std::string& isa);
// The names select_kernels takes on this processor, widest first.
std::vector<std::string> usable_isas();

class Executor {
  public:
    // `active` (num_rows) is the loop's condition: a step runs while any entry is non-zero.
    Executor(std::vector<Instruction> program, const int32_t* active, int64_t num_rows, int num_threads,
             const std::string& isa);

    // Runs up to max_steps steps, until no row is active, keep_going() (asked after each step) says no or interrupt()
    // was called. Returns each step's seconds.
    std::vector<double> run(int64_t max_steps, const std::function<bool()>& keep_going);
    // Ends a run after its present step. From any thread.
    void interrupt() { interrupted_.store(true, std::memory_order_relaxed); }
    void run_instruction(int64_t index);

    // Seconds spent in each instruction so far, while profiling; the cost of a skipped one is that of finding so.
    void set_profiling(bool on);
    const std::vector<double>& profile() const { return seconds_; }

    int num_threads() const { return pool_.size(); }
    const char* isa() const { return kernels_.isa; }
    int64_t size() const { return static_cast<int64_t>(program_.size()); }

  private:
    struct Loop;

    void replay(Loop& loop);
    bool publish_next(Loop& loop);
    void worker_loop(Loop& loop, int thread);
    const Kernel& kernel(const Instruction& ins) const { return kernels_.kernels[static_cast<size_t>(ins.op)]; }
    bool any_active() const;
    void find_rows(const Instruction& ins);
    void set_rows(Scratch& scratch) const;
    void publish(int64_t tasks);

    const std::vector<Instruction> program_;
    const int32_t* active_;
    const int64_t active_rows_;
    const KernelSet& kernels_;
    ThreadPool pool_;
    std::vector<Scratch> scratch_;  // one a thread
    std::vector<std::unique_ptr<float[], void (*)(void*)>> memory_;
    std::vector<int> rows_;  // of the instruction at hand
    std::atomic<int> num_rows_{0};
    std::vector<int> tile_begins_;
    RowTiles tiles_{};
    std::unique_ptr<std::atomic<int32_t>[]> arrivals_;
    std::vector<AttentionQuery> queries_;  // of each thread
    // The instruction all threads work on. A thread takes tasks by lowering `unclaimed`, whose upper half counts what
    // was published so far; whoever completes the last task publishes the next ones.
    std::atomic<size_t> at_{0};
    std::atomic<int64_t> num_tasks_{0};
    std::atomic<bool> packing_{false};  // the tasks are those that pack its rows for all threads
    alignas(64) std::atomic<uint64_t> unclaimed_{0};
    alignas(64) std::atomic<int64_t> completed_{0};
    std::atomic<bool> interrupted_{false};
    bool profiling_ = false;
    std::vector<double> seconds_;
};

}  // namespace skipkernels::cpu
