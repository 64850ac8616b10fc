// A function with a stack of its own, which the scheduler resumes until it suspends itself or returns.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#    define CUDA_HOST_UCONTEXT  // portable, but a system call per switch
#endif
#ifdef CUDA_HOST_UCONTEXT
#    include <ucontext.h>
#endif
#ifndef CUDA_HOST_ASAN
#    define CUDA_HOST_ASAN 0  // 1: the process runs under AddressSanitizer
#endif

namespace cuda_host {

class Fiber {
  public:
    using Entry = void (*)(void* argument);

    Fiber(char* memory, size_t number);  // of kStackBytes
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    static constexpr size_t kStackBytes = CUDA_HOST_ASAN ? 512 << 10 : 256 << 10;  // pages come when touched

    void arm(Entry entry, void* argument);  // a fiber that did not return is abandoned: its frames are not unwound
    void resume();                          // on the scheduler's stack
    void suspend();                         // on this fiber's stack
    bool overflowed() const;                // whether something wrote to the lowest bytes of the stack

  private:
    struct Context {
#ifdef CUDA_HOST_UCONTEXT
        ucontext_t saved;
#else
        void* stack_pointer;
#endif
        void* fake_stack = nullptr;  // AddressSanitizer's
    };
    static void begin();
    void leave(Context& from, Context& to, const void* bottom, size_t size);

    Entry entry_ = nullptr;
    void* argument_ = nullptr;
    char* bottom_;
    char* top_;
    Context own_, resumer_;
    const void* resumer_bottom_ = nullptr;
    size_t resumer_size_ = 0;
    bool returning_ = false;
};

// Fibers that nobody uses. Last in, first out: a stack that was just used is still in the cache.
class FiberPool {
  public:
    static constexpr size_t kMaxFibers = 16384;

    Fiber* take();
    void put(Fiber* fiber) { idle_.push_back(fiber); }
    void put_all_back();  // whoever still holds one has abandoned it
    bool is_stack(const void* p) const { return p >= memory_ && p < memory_ + kBytes; }

  private:
    static constexpr size_t kBytes = (kMaxFibers + 1) * Fiber::kStackBytes;

    // Of all stacks, with room for one more at the lowest addresses, where the first may overflow to. One mapping: with
    // a guard page for each, the libraries of one process came near the 65530 mappings that Linux allows, and past them
    // a stack cannot be written.
    char* memory_ = nullptr;
    std::vector<std::unique_ptr<Fiber>> all_;
    std::vector<Fiber*> idle_;
};

}  // namespace cuda_host
