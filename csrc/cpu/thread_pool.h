// Threads started once, which run one function together. The caller is thread 0.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace skipkernels::cpu {

class ThreadPool {
  public:
    // Throws std::runtime_error where the system does not give that many threads.
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Runs function(thread) on every thread and returns when all have. Not reentrant. In a forked child the threads,
    // which stayed in the parent, are started anew.
    void run(const std::function<void(int)>& function);

  private:
    // The threads beside the caller's and what they share.
    struct Crew {
        explicit Crew(int num_workers);
        ~Crew() { stop(); }
        void stop();
        void work(int thread);

        std::vector<std::thread> threads;
        std::mutex mutex;
        std::condition_variable wake, done;
        const std::function<void(int)>* function = nullptr;
        uint64_t round = 0;
        int running = 0;
        bool stopping = false;
    };

    void leave_other_process();

    int size_;
    int home_;  // the process that the threads are in
    std::unique_ptr<Crew> crew_;
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
