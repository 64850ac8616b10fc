#include "race.h"

#include <algorithm>
#include <string>

#include "scheduler.h"

namespace cuda_host::race {

bool enabled = false;  // not the detector's member: __tsan_init comes before its constructor
Detector detector;

namespace {

constexpr uint32_t kThreadsPerBlock = 1024;

uint32_t number_of(const Thread& thread) { return thread.block->number * kThreadsPerBlock + thread.number; }

uint32_t time_of(const std::shared_ptr<const Times>& times, uint32_t thread) {
    return times && thread < times->size() ? (*times)[thread] : 0;
}

void merge(std::shared_ptr<const Times>& into, const std::shared_ptr<const Times>& times) {
    if (!times || into == times) return;
    if (!into) {
        into = times;
        return;
    }
    auto merged = std::make_shared<Times>(*into);
    if (merged->size() < times->size()) merged->resize(times->size());
    for (size_t i = 0; i < times->size(); ++i) (*merged)[i] = std::max((*merged)[i], (*times)[i]);
    into = std::move(merged);
}

void merge(SharedKnowledge& into, const SharedKnowledge& knowledge) {
    if (!knowledge || into == knowledge) return;
    if (!into) {
        into = knowledge;
        return;
    }
    auto merged = std::make_shared<Knowledge>(*into);
    for (const auto& [block, times] : *knowledge) merge((*merged)[block], times);
    into = std::move(merged);
}

void set_time(std::shared_ptr<const Times>& times, uint32_t thread, uint32_t time) {
    auto changed = times ? std::make_shared<Times>(*times) : std::make_shared<Times>();
    if (changed->size() <= thread) changed->resize(thread + 1);
    (*changed)[thread] = time;
    times = std::move(changed);
}

// All that the thread knows and did.
SharedKnowledge knowledge_of(const Thread& thread) {
    auto knowledge = thread.clock.other_blocks ? std::make_shared<Knowledge>(*thread.clock.other_blocks)
                                               : std::make_shared<Knowledge>();
    auto own_block = thread.clock.own_block;
    set_time(own_block, thread.number, thread.clock.time);
    (*knowledge)[thread.block->number] = std::move(own_block);
    return knowledge;
}

}  // namespace

void Detector::join(const std::vector<Thread*>& threads) {
    if (!enabled) return;
    std::shared_ptr<const Times> own_block, last_own;
    SharedKnowledge other_blocks, last_other;
    for (const Thread* thread : threads) {  // neighbours mostly know the same
        if (thread->clock.own_block != last_own) merge(own_block, last_own = thread->clock.own_block);
        if (thread->clock.other_blocks != last_other) merge(other_blocks, last_other = thread->clock.other_blocks);
    }
    auto joined = own_block ? std::make_shared<Times>(*own_block) : std::make_shared<Times>();
    joined->resize(threads.front()->block->threads.size());
    for (Thread* thread : threads) {
        (*joined)[thread->number] = thread->clock.time++;
        thread->clock.other_blocks = other_blocks;
    }
    for (Thread* thread : threads) thread->clock.own_block = joined;
}

void Detector::tell(Thread& thread, SharedKnowledge& told) {
    merge(told, knowledge_of(thread));
    ++thread.clock.time;
}

void Detector::hear(Thread& thread, const SharedKnowledge& told) {
    if (!told) return;
    merge(thread.clock.other_blocks, told);
    const auto own = told->find(thread.block->number);
    if (own != told->end()) merge(thread.clock.own_block, own->second);
}

void Detector::fence(Thread& thread) {
    if (!enabled) return;
    hear(thread, std::exchange(thread.clock.heard, nullptr));
    thread.clock.fenced = nullptr;
    tell(thread, thread.clock.fenced);
}

Byte* Detector::bytes_at(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (!last_page_ || number != last_number_) {
        auto& page = pages_[number];
        if (!page) page.reset(new Byte[kPageBytes]);
        last_number_ = number;
        last_page_ = page.get();
    }
    return last_page_ + address % kPageBytes;
}

void Detector::forget(const void* p, size_t bytes) {
    if (!enabled) return;
    for (size_t i = 0; i < bytes; ++i) *bytes_at(reinterpret_cast<uintptr_t>(p) + i) = {};
}

bool Detector::is_known(const Thread& thread, const Access& earlier, Kind kind) const {
    if (earlier.time == 0 || earlier.thread == number_of(thread)) return true;
    const uint32_t block = earlier.thread / kThreadsPerBlock, number = earlier.thread % kThreadsPerBlock;
    if (block == thread.block->number) return time_of(thread.clock.own_block, number) >= earlier.time;
    const Grid& grid = *thread.block->grid;
    if (thread.waited_for_dependency && block < grid.first_block) return true;
    if (kind != Kind::read && block < grid.ended_before) return true;
    if (!thread.clock.other_blocks) return false;
    const auto known = thread.clock.other_blocks->find(block);
    return known != thread.clock.other_blocks->end() && time_of(known->second, number) >= earlier.time;
}

void Detector::access(Thread& thread, const void* p, size_t bytes, Kind kind, const void* where) {
    const auto begin = reinterpret_cast<uintptr_t>(p);
    const Access now{number_of(thread), thread.clock.time, where};
    const char* does = kind == Kind::write ? "writes" : "reads";
    Access known;  // most bytes of an access remember the same
    for (uintptr_t address = begin; address < begin + bytes; ++address) {
        Byte& byte = *bytes_at(address);
        if (!(byte.write == known) && !is_known(thread, byte.write, kind))
            report(p, bytes, does, where, byte.write, byte.atomic ? "changed atomically" : "wrote");
        known = byte.write;
        if (kind == Kind::write) {
            for (const Access& read : {byte.first_read, byte.last_read}) {
                if (!is_known(thread, read, kind)) report(p, bytes, does, where, read, "read");
            }
            byte = {now, {}, {}, false};
        } else {
            if (is_known(thread, byte.first_read, Kind::write)) byte.first_read = now;
            byte.last_read = now;
        }
    }
}

void Detector::atomic(Thread& thread, const void* p, size_t bytes, AtomicOrder order, const void* where) {
    if (!enabled) return;
    const bool is_write = order != AtomicOrder::acquire;
    const char* does = is_write ? "changes atomically" : "reads atomically";
    for (size_t i = 0; i < bytes; ++i) {
        Byte& byte = *bytes_at(reinterpret_cast<uintptr_t>(p) + i);
        if (!byte.atomic && !is_known(thread, byte.write, Kind::write))
            report(p, bytes, does, where, byte.write, "wrote");
        if (!is_write) continue;
        for (const Access& read : {byte.first_read, byte.last_read}) {
            if (!is_known(thread, read, Kind::write)) report(p, bytes, does, where, read, "read");
        }
        byte = {{number_of(thread), thread.clock.time, where}, {}, {}, true};
    }
    SharedKnowledge& told = told_[p];
    if (order == AtomicOrder::relaxed) merge(thread.clock.heard, told);
    if (order == AtomicOrder::acquire || order == AtomicOrder::acquire_release) hear(thread, told);
    if (order == AtomicOrder::relaxed) merge(told, thread.clock.fenced);
    if (order == AtomicOrder::release || order == AtomicOrder::acquire_release) tell(thread, told);
}

void Detector::report(const void* p, size_t bytes, const char* does, const void* where, const Access& earlier,
                      const char* did) {
    const Block& block = *scheduler.current().block;
    const auto offset = static_cast<const char*>(p) - block.shared.get();
    const bool is_shared = offset >= 0 && static_cast<size_t>(offset) < block.grid->launch->shared_bytes;
    const std::string memory = is_shared ? "shared memory" : "global memory";
    scheduler.fail("race: " + std::string(does) + " " + std::to_string(bytes) + " bytes of " + memory +
                   (is_shared ? " at " + std::to_string(offset) : "") + " (" + source_line(where) + ") that " +
                   scheduler.describe(earlier.thread / kThreadsPerBlock, earlier.thread % kThreadsPerBlock) + " " +
                   did + " (" + source_line(earlier.where) + "); nothing orders the two");
}

namespace {

inline void announce(const void* p, size_t bytes, Kind kind, const void* where) {
    if (!scheduler.in_kernel() || scheduler.is_stack(p)) return;
    detector.access(scheduler.current(), p, bytes, kind, where);
}

}  // namespace

}  // namespace cuda_host::race

namespace cuda_host {

void watch_atomic(const void* p, size_t bytes, AtomicOrder order) {
    race::detector.atomic(scheduler.current(), p, bytes, order, __builtin_return_address(0));
}

void watch_read(const void* p, size_t bytes) {
    if (race::enabled) race::announce(p, bytes, race::Kind::read, __builtin_return_address(0));
}

void watch_read_past_l1(const void* p, size_t bytes) {
    if (race::enabled) race::announce(p, bytes, race::Kind::read_past_l1, __builtin_return_address(0));
}

void watch_write(const void* p, size_t bytes) {
    if (race::enabled) race::announce(p, bytes, race::Kind::write, __builtin_return_address(0));
}

}  // namespace cuda_host

// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() { cuda_host::race::enabled = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
char __tsan_atomic8_load(const volatile char* p, int order) { return __atomic_load_n(p, order); }  // static locals
#define CUDA_HOST_ACCESS(name, bytes, kind)                                                            \
    void __tsan_##name##bytes(void* p) {                                                               \
        cuda_host::race::announce(p, bytes, cuda_host::race::Kind::kind, __builtin_return_address(0)); \
    }
#define CUDA_HOST_ACCESSES(bytes)                 \
    CUDA_HOST_ACCESS(read, bytes, read)           \
    CUDA_HOST_ACCESS(write, bytes, write)         \
    CUDA_HOST_ACCESS(unaligned_read, bytes, read) \
    CUDA_HOST_ACCESS(unaligned_write, bytes, write)
CUDA_HOST_ACCESSES(1)
CUDA_HOST_ACCESSES(2)
CUDA_HOST_ACCESSES(4)
CUDA_HOST_ACCESSES(8)
CUDA_HOST_ACCESSES(16)
void __tsan_read_range(void* p, unsigned long bytes) {
    cuda_host::race::announce(p, bytes, cuda_host::race::Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long bytes) {
    cuda_host::race::announce(p, bytes, cuda_host::race::Kind::write, __builtin_return_address(0));
}
}
