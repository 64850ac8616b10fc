#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "canary.h"

#if CUDA_HOST_ASAN
#    include <sanitizer/asan_interface.h>

#    include <cstdio>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

Scheduler scheduler;

namespace {

constexpr unsigned kMaxIdleRounds = 1000;
// Resident threads of one kernel; the rest is for those that overlap with it.
constexpr unsigned kMaxThreads = FiberPool::kMaxFibers / 2;

unsigned volume(const dim3& size) { return size.x * size.y * size.z; }

// 0xff is NaN in every format that kernels use. A canary lies behind, but AddressSanitizer has its own guard around
// malloc's memory.
SharedMemory make_shared_memory(size_t bytes) {
    auto* memory = static_cast<char*>(std::malloc(bytes + (CUDA_HOST_ASAN ? 0 : kCanaryBytes)));
    std::memset(memory, 0xff, bytes);
    if (!CUDA_HOST_ASAN) put_canary(memory + bytes);
    return SharedMemory(memory);
}

bool stayed_in_shared_memory(const Block& block) {
    return CUDA_HOST_ASAN || canary_is_intact(block.shared.get() + block.grid->launch->shared_bytes);
}

#if CUDA_HOST_ASAN
void add_place_to_report(const char*) {
    if (scheduler.in_kernel()) std::fprintf(stderr, "In %s\n", scheduler.place().c_str());
}
#endif

}  // namespace

uint3 unravel(unsigned number, const dim3& size) {
    return make_uint3(number % size.x, number / size.x % size.y, number / size.x / size.y);
}

uint64_t Scheduler::Random::operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void Scheduler::set_seed(uint64_t seed) {
    seed_ = seed;
    runs_before_seed_ = runs_;
    order_ = seed == 0 ? Order::ascending : seed == 1 ? Order::descending : Order::shuffled;
    random_.state = seed;
}

std::string Scheduler::run(const std::vector<const Launch*>& chain, unsigned max_resident_blocks) {
#if CUDA_HOST_ASAN
    __asan_set_error_report_callback(add_place_to_report);
#endif
    random_.state = seed_ << 32 | (runs_++ - runs_before_seed_);
    early_dependents_ = order_ == Order::ascending || (order_ == Order::shuffled && random_below(2));
    grids_.reserve(chain.size());  // threads point to their grid
    for (const Launch* launch : chain) {
        Grid* primary = grids_.empty() ? nullptr : &grids_.back();
        grids_.push_back(make_grid(*launch, primary, max_resident_blocks, chain.size() > 1));
    }
    race::detector.begin_run();
    may_start_blocks_ = true;
    idle_rounds_ = live_threads_ = 0;
    while (failure_.empty()) {
        if (may_start_blocks_) start_blocks();
        Thread* thread = next_thread();
        if (thread) {
            resume(*thread);
        } else if (grids_.back().complete()) {
            break;
        } else if (failure_.empty()) {
            describe_waiting();
        }
    }
    if (!failure_.empty()) fibers_.put_all_back();
    ready_.clear();
    polling_.clear();
    grids_.clear();
    return std::exchange(failure_, {});
}

Grid Scheduler::make_grid(const Launch& launch, Grid* primary, unsigned max_resident_blocks, bool overlaps) {
    Grid grid;
    grid.launch = &launch;
    grid.primary = primary;
    grid.block_order.resize(volume(launch.grid));
    std::iota(grid.block_order.begin(), grid.block_order.end(), 0u);
    // kernels overlap most when all blocks are there
    if (order_ == Order::ascending && overlaps) grid.max_resident = std::min(grid.num_blocks(), max_resident_blocks);
    if (order_ == Order::descending) std::reverse(grid.block_order.begin(), grid.block_order.end());
    if (order_ == Order::shuffled) {
        for (unsigned i = grid.num_blocks(); i > 1; --i)
            std::swap(grid.block_order[i - 1], grid.block_order[random_below(i)]);
        grid.max_resident = 1 + static_cast<unsigned>(random_below(std::min(grid.num_blocks(), max_resident_blocks)));
    }
    grid.max_resident = std::min(grid.max_resident, kMaxThreads / volume(launch.block));
    if (launch.cooperative) grid.max_resident = grid.num_blocks();
    if (launch.cooperative && grid.num_blocks() * volume(launch.block) > kMaxThreads)
        failure_ = "a cooperative launch of more than " + std::to_string(kMaxThreads) + " threads: configure fewer SMs";
    if (primary) grid.first_block = primary->first_block + primary->num_blocks();
    grid.ended_by_trigger = grid.first_block;
    return grid;
}

void Scheduler::start_blocks() {
    may_start_blocks_ = false;
    for (Grid& grid : grids_) {
        if (grid.primary && !grid.primary->complete() &&
            !(early_dependents_ && grid.primary->triggered == grid.primary->num_blocks()))
            break;
        const bool overlaps = grid.primary && !grid.primary->complete();
        if (grid.primary) grid.ended_before = grid.primary->ended_by_trigger;
        while (grid.started < grid.num_blocks() && grid.resident.size() < grid.max_resident &&
               !(overlaps && live_threads_ + volume(grid.launch->block) > kMaxThreads))
            start_block(grid);
    }
}

void Scheduler::start_block(Grid& grid) {
    const Launch& launch = *grid.launch;
    const unsigned number = grid.block_order[grid.started++], size = volume(launch.block);
    live_threads_ += size;
    grid.resident.push_back(std::make_unique<Block>());
    Block& block = *grid.resident.back();
    block.grid = &grid;
    block.number = grid.first_block + number;
    block.index = unravel(number, launch.grid);
    block.waiting_lanes.resize((size + 31) / 32);
    block.shared = make_shared_memory(launch.shared_bytes);
    race::detector.forget(block.shared.get(), launch.shared_bytes);
    block.threads.resize(size);
    std::vector<Thread*> threads;
    for (unsigned i = 0; i < size; ++i) {
        Thread& thread = block.threads[i];
        thread.block = &block;
        thread.index = unravel(i, launch.block);
        thread.number = i;
        threads.push_back(&thread);
    }
    make_ready(std::move(threads));
}

void Scheduler::finish_block(Block& block) {
    Grid& grid = *block.grid;
    if (!stayed_in_shared_memory(block)) {
        failure_ = "kernel " + function_name(grid.launch->function) + ", block " + text_of(block.index) +
                   ": wrote past the end of its " + std::to_string(grid.launch->shared_bytes) +
                   " bytes of shared memory";
        return;
    }
    if (!block.triggered) ++grid.triggered;
    ++grid.finished;
    live_threads_ -= static_cast<unsigned>(block.threads.size());
    may_start_blocks_ = true;
    grid.resident.erase(std::find_if(grid.resident.begin(), grid.resident.end(),
                                     [&](const auto& resident) { return resident.get() == &block; }));
    if (grid.complete() && &grid != &grids_.back()) make_ready(std::move((&grid + 1)->waiting_for_primary));
}

// Puts threads, given in ascending order, where next_thread() finds them in the order of the seed.
void Scheduler::make_ready(std::vector<Thread*> threads) {
    made_progress();
    if (order_ == Order::ascending) std::reverse(threads.begin(), threads.end());
    if (order_ == Order::shuffled) {
        for (size_t i = threads.size(); i > 1; --i) std::swap(threads[i - 1], threads[random_below(i)]);
    }
    for (Thread* thread : threads) {
        thread->site = {};
        ready_.push_back(thread);
    }
}

Thread* Scheduler::next_thread() {
    if (ready_.empty()) {
        if (++idle_rounds_ > kMaxIdleRounds) return nullptr;
        ready_.swap(polling_);
    }
    if (ready_.empty()) return nullptr;
    // Mostly the last one goes on, so that some warps get far ahead of others.
    if (order_ == Order::shuffled && random_below(4) == 0)
        std::swap(ready_.back(), ready_[random_below(ready_.size())]);
    Thread* thread = ready_.back();
    ready_.pop_back();
    return thread;
}

void Scheduler::resume(Thread& thread) {
    if (!thread.fiber) {
        thread.fiber = fibers_.take();
        thread.fiber->arm(run_thread, &thread);
    }
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    blockDim = thread.block->grid->launch->block;
    gridDim = thread.block->grid->launch->grid;
    current_ = &thread;
    ++switches_;
    thread.fiber->resume();
    current_ = nullptr;
    if (!thread.exited || !failure_.empty()) return;
    made_progress();
    fibers_.put(thread.fiber);
    Block& block = *thread.block;
    if (++block.exited == block.threads.size()) finish_block(block);
}

void Scheduler::run_thread(void* argument) {
    auto& thread = *static_cast<Thread*>(argument);
    const Launch& launch = *thread.block->grid->launch;
    launch.run();
    if (thread.fiber->overflowed())
        scheduler.fail("needs more than the " + std::to_string(Fiber::kStackBytes) + " bytes of its stack");
    if (launch.programmatic && !thread.waited_for_dependency) {
        scheduler.fail("exits without griddepcontrol.wait, though launched with programmatic stream serialization");
    }
    thread.exited = true;
}

void Scheduler::suspend(Site site) {
    current_->site = site;
    current_->mask = 0;
    current_->fiber->suspend();
}

void Scheduler::maybe_yield() {
    if (order_ != Order::shuffled || random_below(2)) return;
    ready_.push_back(current_);
    std::swap(ready_.back(), ready_[random_below(ready_.size())]);
    current_->fiber->suspend();
}

void Scheduler::wait_a_while() {
    polling_.push_back(current_);
    current_->fiber->suspend();
}

void Scheduler::trigger_dependents() {
    Block& block = *current_->block;
    Grid& grid = *block.grid;
    if (!std::exchange(block.triggered, true)) {
        ++grid.triggered;
        // a block that has waited starts dependents behind the end of all that came before it
        if (!current_->waited_for_dependency) grid.ended_by_trigger = grid.ended_before;
        may_start_blocks_ = true;
    }
    // early dependents run as far as they get before this thread goes on
    if (early_dependents_ && &grid != &grids_.back()) wait_a_while();
}

void Scheduler::wait_for_dependency() {
    current_->waited_for_dependency = true;
    Grid& grid = *current_->block->grid;
    if (!grid.primary || grid.primary->complete()) return;
    grid.waiting_for_primary.push_back(current_);
    suspend({"griddepcontrol.wait", "", 0});
}

}  // namespace cuda_host
