// Threads started once, which run one function together. The caller is thread 0.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace skipkernels::cpu {

class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs function(thread) on every thread and returns when all have. Not reentrant.
    void run(const std::function<void(int)>& function);

  private:
    void work(int thread);

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int)>* function_ = nullptr;
    uint64_t round_ = 0;
    int running_ = 0;
    bool stopping_ = false;
};

// A place where threads wait for one another; the last to arrive runs `last` before all go on.
// Spins first, since the other threads are at most a task away, then yields the processor.
class Barrier {
  public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {}

    template <class Last>
    void arrive(Last last) {
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            last();
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < kSpins) {
                pause();
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    static constexpr int kSpins = 4096;  // about 50 us; with fewer processors than threads, yielding must come soon

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    const int num_threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace skipkernels::cpu
