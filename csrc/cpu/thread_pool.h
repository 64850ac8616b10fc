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

// How a thread waits for another: it spins first, since what it waits for is at most a task away, then gives its
// processor away, since with fewer processors than threads the other may need it.
class Backoff {
  public:
    void wait() {
        if (spins_ < kSpins) {
            ++spins_;
            pause();
        } else {
            std::this_thread::yield();
        }
    }
    void reset() { spins_ = 0; }

  private:
    static constexpr int kSpins = 4096;  // about 50 us

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    int spins_ = 0;
};

}  // namespace skipkernels::cpu
