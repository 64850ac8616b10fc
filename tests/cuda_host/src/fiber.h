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

    explicit Fiber(unsigned number);  // how many there are already
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    void arm(Entry entry, void* argument);  // a fiber that did not return is abandoned: its frames are not unwound
    void resume();                          // on the scheduler's stack
    void suspend();                         // on this fiber's stack

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
    char* memory_;
    char* top_;
    Context own_, resumer_;
    const void* resumer_bottom_ = nullptr;
    size_t resumer_size_ = 0;
    bool returning_ = false;
};

// Fibers that nobody uses. Last in, first out: a stack that was just used is still in the cache.
class FiberPool {
  public:
    Fiber* take();
    void put(Fiber* fiber) { idle_.push_back(fiber); }
    void put_all_back();  // whoever still holds one has abandoned it

  private:
    std::vector<std::unique_ptr<Fiber>> all_;
    std::vector<Fiber*> idle_;
};

}  // namespace cuda_host
