// The part of ptx_host.h that needs the scheduler.
#include <ptx_host.h>

#include <algorithm>
#include <cstring>

#include "runtime.h"
#include "scheduler.h"

namespace skipkernels::cuda::ptx {

using cuda_host::Copy;
using cuda_host::scheduler;

namespace {

// The thread's copies of groups before `end`.
void carry_out_copies(int end) {
    auto& copies = scheduler.current().copies;
    const auto waiting = std::stable_partition(copies.begin(), copies.end(), [&](const Copy& copy) {
        if (copy.group < end) std::memcpy(copy.to, copy.from, copy.bytes);
        return copy.group >= end;
    });
    copies.erase(waiting, copies.end());
}

}  // namespace

char* shared_memory() { return scheduler.current().block->shared.get(); }

void grid_dependency_wait() { scheduler.wait_for_dependency(); }

void grid_dependency_launch() { scheduler.trigger_dependents(); }

unsigned long long global_timer() {
    static unsigned long long now = 0;
    return ++now;
}

unsigned multiprocessor() {
    const auto& block = *scheduler.current().block;
    return block.number % static_cast<unsigned>(cuda_host::runtime.settings.sm_count);
}

void start_copy(void* to_shared, const void* from, uint32_t bytes) {
    const cuda_host::Block& block = *scheduler.current().block;
    const auto* to = static_cast<const char*>(to_shared);
    if (to < block.shared.get() || to + bytes > block.shared.get() + block.grid->launch->shared_bytes)
        cuda_host::fail("copy_async: %p is outside of shared memory", to_shared);
    cuda_host::Thread& thread = scheduler.current();
    thread.copies.push_back({to_shared, from, bytes, thread.copy_groups});
}

void commit_copies() {
    const int groups = ++scheduler.current().copy_groups;
    // A copy may be done at any time after its start. Ascending seeds are late, descending ones early.
    if (scheduler.order() == cuda_host::Order::descending ||
        (scheduler.order() == cuda_host::Order::shuffled && scheduler.random_below(2)))
        carry_out_copies(groups);
}

void finish_copies(int pending) { carry_out_copies(scheduler.current().copy_groups - pending); }

}  // namespace skipkernels::cuda::ptx
