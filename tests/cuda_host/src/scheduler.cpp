#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

Scheduler scheduler;

namespace {

constexpr size_t kCanaryBytes = 64;  // behind shared memory, where no AddressSanitizer watches
constexpr unsigned kMaxIdleRounds = 1000;

bool same_site(const Site& a, const Site& b) {
    return a.line == b.line && std::strcmp(a.call, b.call) == 0 && std::strcmp(a.file, b.file) == 0;
}

std::string text_of(const Site& site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(site.call) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

uint3 unravel(unsigned number, const dim3& size) {
    return make_uint3(number % size.x, number / size.x % size.y, number / size.x / size.y);
}

unsigned volume(const dim3& size) { return size.x * size.y * size.z; }

// 0xff is NaN in every format that kernels use. AddressSanitizer has its own guard around malloc's memory.
std::unique_ptr<char, void (*)(void*)> make_shared_memory(size_t bytes) {
    auto* memory = static_cast<char*>(std::malloc(bytes + (CUDA_HOST_ASAN ? 0 : kCanaryBytes)));
    std::memset(memory, 0xff, bytes);
    if (!CUDA_HOST_ASAN) std::memset(memory + bytes, 0x5a, kCanaryBytes);
    return {memory, std::free};
}

bool canary_is_intact(const Block& block) {
    const char* end = block.shared.get() + block.grid->launch->shared_bytes;
    return CUDA_HOST_ASAN || std::all_of(end, end + kCanaryBytes, [](char byte) { return byte == 0x5a; });
}

}  // namespace

std::string text_of(uint3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

uint64_t Scheduler::Random::operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void Scheduler::set_seed(uint64_t seed) {
    seed_ = seed;
    runs_ = 0;
    order_ = seed == 0 ? Order::ascending : seed == 1 ? Order::descending : Order::shuffled;
    random_.state = seed;
}

std::string Scheduler::run(const std::vector<const Launch*>& chain, unsigned max_resident_blocks) {
    random_.state = seed_ << 32 | runs_++;
    early_dependents_ = order_ == Order::ascending || (order_ == Order::shuffled && random_below(2));
    grids_.reserve(chain.size());  // threads point to their grid
    for (const Launch* launch : chain) {
        grids_.push_back(make_grid(*launch, grids_.empty() ? nullptr : &grids_.back(), max_resident_blocks));
    }
    may_start_blocks_ = true;
    idle_rounds_ = 0;
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

Grid Scheduler::make_grid(const Launch& launch, Grid* primary, unsigned max_resident_blocks) {
    Grid grid;
    grid.launch = &launch;
    grid.primary = primary;
    grid.block_order.resize(volume(launch.grid));
    std::iota(grid.block_order.begin(), grid.block_order.end(), 0u);
    if (order_ == Order::descending) std::reverse(grid.block_order.begin(), grid.block_order.end());
    if (order_ == Order::shuffled) {
        for (unsigned i = grid.num_blocks(); i > 1; --i)
            std::swap(grid.block_order[i - 1], grid.block_order[random_below(i)]);
        grid.max_resident = 1 + static_cast<unsigned>(random_below(std::min(grid.num_blocks(), max_resident_blocks)));
    }
    if (launch.cooperative) grid.max_resident = grid.num_blocks();
    return grid;
}

void Scheduler::start_blocks() {
    may_start_blocks_ = false;
    for (Grid& grid : grids_) {
        if (grid.primary && !grid.primary->complete() &&
            !(early_dependents_ && grid.primary->triggered == grid.primary->num_blocks()))
            break;
        while (grid.started < grid.num_blocks() && grid.resident.size() < grid.max_resident) start_block(grid);
    }
}

void Scheduler::start_block(Grid& grid) {
    const Launch& launch = *grid.launch;
    const unsigned number = grid.block_order[grid.started++], size = volume(launch.block);
    grid.resident.push_back(std::make_unique<Block>(Block{&grid,
                                                          unravel(number, launch.grid),
                                                          {},
                                                          std::vector<uint32_t>((size + 31) / 32),
                                                          0,
                                                          nullptr,
                                                          0,
                                                          false,
                                                          make_shared_memory(launch.shared_bytes)}));
    Block& block = *grid.resident.back();
    block.threads.reserve(size);
    std::vector<Thread*> threads;
    for (unsigned i = 0; i < size; ++i) {
        block.threads.push_back(Thread{&block, unravel(i, launch.block), i});
        threads.push_back(&block.threads.back());
    }
    make_ready(std::move(threads));
}

void Scheduler::finish_block(Block& block) {
    Grid& grid = *block.grid;
    if (!canary_is_intact(block)) {
        failure_ = "kernel " + function_name(grid.launch->function) + ", block " + text_of(block.index) +
                   ": wrote past the end of its " + std::to_string(grid.launch->shared_bytes) +
                   " bytes of shared memory";
        return;
    }
    if (!block.triggered) ++grid.triggered;
    ++grid.finished;
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

void Scheduler::barrier(Site site) {
    Block& block = *current_->block;
    if (block.arrived == 0) block.first_arrived = current_;
    const Thread& first = *block.first_arrived;
    if (block.arrived && !same_site(first.site, site)) {
        fail("arrives at " + text_of(site) + ", while thread " + text_of(first.index) + " waits at " +
             text_of(first.site));
    }
    if (++block.arrived == block.threads.size()) {
        block.arrived = 0;
        std::vector<Thread*> threads;
        for (Thread& thread : block.threads) threads.push_back(&thread);
        make_ready(std::move(threads));
        current_->fiber->suspend();
    } else {
        suspend(site);
    }
}

void Scheduler::collective(Site site, uint32_t mask, void* operand, void (*complete)(LaneOperands&, uint32_t)) {
    Thread& thread = *current_;
    const unsigned warp = thread.number / 32;
    uint32_t& waiting = thread.block->waiting_lanes[warp];
    thread.site = site;
    thread.mask = mask;
    thread.operand = operand;
    if (!(mask >> thread.number % 32 & 1)) fail("is not in its own mask at " + text_of(site));
    waiting |= 1u << thread.number % 32;
    if ((waiting & mask) == mask) {
        std::vector<Thread*> lanes;
        void* operands[32] = {};
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Thread& other = thread.block->threads[warp * 32 + lane];
            if (other.mask != mask || !same_site(other.site, site)) break;  // reported once nobody can go on
            operands[lane] = other.operand;
            lanes.push_back(&other);
        }
        if (lanes.size() == static_cast<size_t>(__popc(mask))) {
            complete(operands, mask);
            waiting &= ~mask;
            make_ready(std::move(lanes));
        }
    }
    thread.fiber->suspend();
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
    if (std::exchange(block.triggered, true)) return;
    ++block.grid->triggered;
    may_start_blocks_ = true;
    maybe_yield();
}

void Scheduler::wait_for_dependency() {
    current_->waited_for_dependency = true;
    Grid& grid = *current_->block->grid;
    if (!grid.primary || grid.primary->complete()) return;
    grid.waiting_for_primary.push_back(current_);
    suspend({"griddepcontrol.wait", "", 0});
}

void Scheduler::fail(const std::string& message) {
    const Grid& grid = *current_->block->grid;
    failure_ = "kernel " + function_name(grid.launch->function) + ", block " + text_of(current_->block->index) +
               ", thread " + text_of(current_->index) + ": " + message;
    current_->fiber->suspend();
    std::abort();  // a failed launch resumes nobody
}

// Everybody waits, for something that cannot happen any more.
void Scheduler::describe_waiting() {
    std::ostringstream report;
    for (const Grid& grid : grids_) {
        if (grid.complete()) continue;
        report << "kernel " << function_name(grid.launch->function) << ": no thread can go on";
        for (const auto& block : grid.resident) {
            report << "\n  block " << text_of(block->index) << ":";
            std::vector<std::string> groups;
            std::vector<std::vector<const Thread*>> members;
            for (const Thread& thread : block->threads) {
                std::ostringstream group;
                if (thread.exited) {
                    group << "exited";
                } else if (!thread.site.call) {
                    group << "poll";
                } else if (thread.mask) {
                    group << "wait at " << text_of(thread.site) << " in warp " << thread.number / 32 << " with mask 0x"
                          << std::hex << thread.mask;
                } else {
                    group << "wait at " << text_of(thread.site);
                }
                const auto found = std::find(groups.begin(), groups.end(), group.str());
                if (found == groups.end()) members.emplace_back();
                members[static_cast<size_t>(found - groups.begin())].push_back(&thread);
                if (found == groups.end()) groups.push_back(group.str());
            }
            for (size_t i = 0; i < groups.size(); ++i) {
                report << "\n    " << members[i].size() << " of " << block->threads.size() << " threads " << groups[i]
                       << ": " << text_of(members[i].front()->index);
                if (members[i].size() > 1) report << " to " << text_of(members[i].back()->index);
            }
        }
        break;
    }
    failure_ = report.str();
}

void block_barrier(Site site) { scheduler.barrier(site); }

void warp_collective(Site site, uint32_t mask, void* operand, void (*complete)(LaneOperands&, uint32_t)) {
    scheduler.collective(site, mask, operand, complete);
}

void maybe_yield() { scheduler.maybe_yield(); }
void wait_a_while() { scheduler.wait_a_while(); }
void made_progress() { scheduler.made_progress(); }
unsigned lane_id() { return scheduler.current().number % 32; }

void fail(const char* what, ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, what);
    std::vsnprintf(message, sizeof message, what, arguments);
    va_end(arguments);
    if (!scheduler.in_kernel()) throw std::logic_error(message);
    scheduler.fail(message);
}

void complete_shuffle(LaneOperands& operands, uint32_t mask) {
    uint64_t bits[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) bits[lane] = static_cast<const ShuffleOperand*>(operands[lane])->bits;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        auto& operand = *static_cast<ShuffleOperand*>(operands[lane]);
        if (!(mask >> operand.source & 1)) {
            scheduler.fail(text_of(scheduler.current().site) + ": lane " + std::to_string(lane) + " reads lane " +
                           std::to_string(operand.source) + ", which is not in the mask");
        }
        operand.bits = bits[operand.source];
    }
}

uint32_t vote(Site site, uint32_t mask, bool predicate) {
    struct Vote {
        bool predicate;
        uint32_t result;
    } operand{predicate, 0};
    warp_collective(site, mask, &operand, [](LaneOperands& operands, uint32_t mask) {
        uint32_t result = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (mask >> lane & 1) result |= uint32_t{static_cast<const Vote*>(operands[lane])->predicate} << lane;
        }
        for (void* lane : operands) {
            if (lane) static_cast<Vote*>(lane)->result = result;
        }
    });
    return operand.result;
}

}  // namespace cuda_host
