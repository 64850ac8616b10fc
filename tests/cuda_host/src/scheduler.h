// Runs the threads of one grid, or of several that overlap, on one processor. See cuda_runtime.h for the idea.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "race.h"

namespace cuda_host {

enum class Order { ascending, descending, shuffled };

struct Block;
struct Grid;

struct Copy {  // cp.async
    void* to;
    const void* from;
    uint32_t bytes;
    int group;
};

struct Thread {
    Block* block;
    uint3 index;
    unsigned number;         // in its block
    Fiber* fiber = nullptr;  // from its first step to its last
    bool exited = false;
    bool waited_for_dependency = false;
    Site site{};  // what it waits at; no call means that it can go on
    uint32_t mask = 0;
    void* operand = nullptr;
    std::vector<Copy> copies;  // that were not carried out yet
    int copy_groups = 0;       // committed
    race::Clock clock;
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using SharedMemory = std::unique_ptr<char, Free>;

struct Block {
    Grid* grid;
    unsigned number;  // among those of all grids that run
    uint3 index;
    std::vector<Thread> threads;
    std::vector<uint32_t> waiting_lanes;  // of each warp: lanes in a collective
    unsigned arrived = 0;                 // at the barrier
    const Thread* first_arrived = nullptr;
    unsigned exited = 0;
    bool triggered = false;  // its part of griddepcontrol.launch_dependents
    SharedMemory shared;
};

struct Grid {
    const Launch* launch;
    Grid* primary;                  // the launch that griddepcontrol.wait waits for, if any
    unsigned first_block = 0;       // its number
    unsigned ended_before = 0;      // blocks with lower numbers have ended when it starts
    unsigned ended_by_trigger = 0;  // and when it lets the next one start
    std::vector<unsigned> block_order;
    unsigned max_resident = 1;
    unsigned started = 0, triggered = 0, finished = 0;  // blocks
    std::vector<std::unique_ptr<Block>> resident;
    std::vector<Thread*> waiting_for_primary;

    unsigned num_blocks() const { return static_cast<unsigned>(block_order.size()); }
    bool complete() const { return finished == num_blocks(); }
};

class Scheduler {
  public:
    void set_seed(uint64_t seed);
    uint64_t switches() const { return switches_; }
    uint64_t runs() const { return runs_; }  // of all time
    uint64_t random_below(uint64_t bound) { return (random_() >> 32) * bound >> 32; }
    Order order() const { return order_; }

    // Runs launches to their end. Each one but the first may start when the one before it lets it
    // (griddepcontrol.launch_dependents). Returns what went wrong, or an empty string.
    std::string run(const std::vector<const Launch*>& chain, unsigned max_resident_blocks);

    // of the thread that is running
    Thread& current() { return *current_; }
    bool in_kernel() const { return current_ != nullptr; }
    bool is_stack(const void* p) const { return fibers_.is_stack(p); }
    std::string place() const;  // kernel, block and thread
    std::string describe(unsigned block, unsigned thread) const;
    void barrier(Site site);
    void collective(Site site, uint32_t mask, void* operand, void (*complete)(LaneOperands&, uint32_t));
    void maybe_yield();
    void wait_a_while();
    void made_progress() { idle_rounds_ = 0; }
    void trigger_dependents();
    void wait_for_dependency();
    [[noreturn]] void fail(const std::string& message);

  private:
    struct Random {  // splitmix64
        uint64_t state = 0;
        uint64_t operator()();
    };

    Grid make_grid(const Launch& launch, Grid* primary, unsigned max_resident_blocks, bool overlaps);
    void start_blocks();
    void start_block(Grid& grid);
    void finish_block(Block& block);
    Thread* next_thread();
    void resume(Thread& thread);
    void suspend(Site site);
    void make_ready(std::vector<Thread*> threads);
    void describe_waiting();
    static void run_thread(void* thread);

    uint64_t seed_ = 0, runs_ = 0, runs_before_seed_ = 0, switches_ = 0;
    Order order_ = Order::ascending;
    Random random_;
    FiberPool fibers_;
    std::vector<Grid> grids_;
    std::vector<Thread*> ready_;    // the last one runs next, unless the order is shuffled
    std::vector<Thread*> polling_;  // they run when no one is ready
    bool may_start_blocks_ = false;
    bool early_dependents_ = true;
    unsigned idle_rounds_ = 0;  // of polling, since anything happened
    unsigned live_threads_ = 0;
    Thread* current_ = nullptr;
    std::string failure_;
};

extern Scheduler scheduler;
uint3 unravel(unsigned number, const dim3& size);

// report.cpp
std::string text_of(uint3 index);
std::string text_of(const Site& site);

// symbols.cpp
std::string function_name(const void* function);
std::string source_line(const void* return_address);

}  // namespace cuda_host
