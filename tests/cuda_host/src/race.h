// Finds memory accesses of a kernel that nothing orders, whether or not they do harm under the schedule at hand.
//
// build.py compiles kernels with -fsanitize=thread when asked for races; the compiler then announces every access
// by calls (__tsan_read4, ...) which race.cpp answers instead of ThreadSanitizer's library. Each thread has a time, and
// knows up to which of their times it is behind other threads (a vector clock): a barrier or warp collective tells its
// threads all they know, an atomic tells what its address was told before. Each byte of memory remembers who wrote and
// read it last and when. An access is a race if it touches what a thread did at a time this one does not know of.
//
// Before its griddepcontrol.wait, a kernel knows of those that had ended when it was let start; but a plain read may
// still find in L1 what was there before them (ptx::load_relaxed does not).
//
// Told and asked are: atomic_add_acq_rel and the like, or plain atomics with a __threadfence before and after.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace cuda_host {

struct Block;
struct Thread;

namespace race {

using Times = std::vector<uint32_t>;                                 // of a block's threads; shorter: zeros
using Knowledge = std::map<unsigned, std::shared_ptr<const Times>>;  // of blocks
using SharedKnowledge = std::shared_ptr<const Knowledge>;

// What a thread knows. Copied often, so that what many threads know is shared.
struct Clock {
    uint32_t time = 1;  // the thread's own
    std::shared_ptr<const Times> own_block;
    SharedKnowledge other_blocks;
    SharedKnowledge fenced;  // known at the last fence: what relaxed atomics tell
    SharedKnowledge heard;   // from relaxed atomics: known from the next fence on
};

// An access that a byte remembers.
struct Access {
    uint32_t thread = 0;
    uint32_t time = 0;  // 0: none
    const void* where = nullptr;
    bool operator==(const Access& other) const { return thread == other.thread && time == other.time; }
};

struct Byte {
    Access write, first_read, last_read;  // reads since the write; of many that are unordered, two are kept
    bool atomic = false;                  // the write
};

extern bool enabled;  // kernels were compiled for it

enum class Kind { read, read_past_l1, write };

class Detector {
  public:
    void begin_run() {
        pages_.clear();
        told_.clear();
        last_page_ = nullptr;
    }
    void forget(const void* p, size_t bytes);  // memory with a new life
    void join(const std::vector<Thread*>& threads);
    void fence(Thread& thread);
    void access(Thread& thread, const void* p, size_t bytes, Kind kind, const void* where);
    void atomic(Thread& thread, const void* p, size_t bytes, AtomicOrder order, const void* where);

  private:
    static constexpr size_t kPageBytes = 1024;
    Byte* bytes_at(uintptr_t address);
    bool is_known(const Thread& thread, const Access& earlier, Kind kind) const;
    void tell(Thread& thread, SharedKnowledge& told);
    void hear(Thread& thread, const SharedKnowledge& told);
    [[noreturn]] void report(const void* p, size_t bytes, const char* does, const void* where, const Access& earlier,
                             const char* did);

    std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages_;
    uintptr_t last_number_ = 0;
    Byte* last_page_ = nullptr;
    std::unordered_map<const void*, SharedKnowledge> told_;  // to atomics at this address
};

extern Detector detector;

}  // namespace race

}  // namespace cuda_host
