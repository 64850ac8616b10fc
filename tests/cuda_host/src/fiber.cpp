#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "canary.h"

#if CUDA_HOST_ASAN
#    include <sanitizer/asan_interface.h>
#    include <sanitizer/common_interface_defs.h>
#endif

#ifndef CUDA_HOST_UCONTEXT
// Saves what the calling convention says a callee preserves, and exchanges the stack pointer.
extern "C" void cuda_host_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.hidden cuda_host_switch
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif

namespace cuda_host {

namespace {

Fiber* starting = nullptr;

}  // namespace

Fiber::Fiber(char* memory, size_t number) : bottom_(memory) {
    // Were all tops aligned alike, the frames of all fibers would compete for the same few cache sets.
    top_ = bottom_ + kStackBytes - number % 16 * 256;
}

void Fiber::arm(Entry entry, void* argument) {
#if CUDA_HOST_ASAN
    __asan_unpoison_memory_region(bottom_, kStackBytes);  // frames that were abandoned
    own_.fake_stack = nullptr;
#endif
    put_canary(bottom_);
    entry_ = entry;
    argument_ = argument;
    returning_ = false;
#ifdef CUDA_HOST_UCONTEXT
    getcontext(&own_.saved);
    own_.saved.uc_stack.ss_sp = bottom_;
    own_.saved.uc_stack.ss_size = static_cast<size_t>(top_ - bottom_);
    own_.saved.uc_link = nullptr;
    makecontext(&own_.saved, &Fiber::begin, 0);
#else
    // what cuda_host_switch pops: six registers and the address to return to, after which the stack pointer must be
    // 8 below a multiple of 16, as if begin() had been called
    auto** stack = reinterpret_cast<void**>(top_) - 2;
    *stack = reinterpret_cast<void*>(&Fiber::begin);
    own_.stack_pointer = stack - 6;
#endif
}

bool Fiber::overflowed() const { return !canary_is_intact(bottom_); }

void Fiber::resume() {
    starting = this;
    leave(resumer_, own_, bottom_, kStackBytes);
}

void Fiber::suspend() { leave(own_, resumer_, resumer_bottom_, resumer_size_); }

void Fiber::leave(Context& from, Context& to, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if CUDA_HOST_ASAN
    __sanitizer_start_switch_fiber(returning_ ? nullptr : &from.fake_stack, bottom, size);
#endif
#ifdef CUDA_HOST_UCONTEXT
    swapcontext(&from.saved, &to.saved);
#else
    cuda_host_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if CUDA_HOST_ASAN
    if (&from == &own_) {
        __sanitizer_finish_switch_fiber(from.fake_stack, &resumer_bottom_, &resumer_size_);
    } else {
        __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
    }
#endif
}

void Fiber::begin() {
    Fiber& fiber = *starting;
#if CUDA_HOST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &fiber.resumer_bottom_, &fiber.resumer_size_);
#endif
    fiber.entry_(fiber.argument_);
    fiber.returning_ = true;
    fiber.suspend();
    std::abort();  // resumed without arm()
}

Fiber* FiberPool::take() {
    if (idle_.empty()) {
        if (!memory_) {
            void* memory =
                mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
            madvise(memory, kBytes, MADV_NOHUGEPAGE);  // a huge page holds eight stacks, each of which touches little
            memory_ = static_cast<char*>(memory);
        }
        if (all_.size() == kMaxFibers) throw std::length_error("more than 16384 threads wait at the same time");
        all_.push_back(std::make_unique<Fiber>(memory_ + (all_.size() + 1) * Fiber::kStackBytes, all_.size()));
        return all_.back().get();
    }
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    return fiber;
}

void FiberPool::put_all_back() {
    idle_.clear();
    for (const auto& fiber : all_) idle_.push_back(fiber.get());
}

}  // namespace cuda_host
