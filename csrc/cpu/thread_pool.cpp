#include "thread_pool.h"

#include <unistd.h>

#include <stdexcept>
#include <string>
#include <system_error>

namespace skipkernels::cpu {

ThreadPool::Crew::Crew(int num_workers) {
    try {
        for (int worker = 1; worker <= num_workers; ++worker) threads.emplace_back(&Crew::work, this, worker);
    } catch (const std::system_error& error) {
        const size_t started = threads.size();
        stop();
        throw std::runtime_error("only " + std::to_string(started + 1) + " of " + std::to_string(num_workers + 1) +
                                 " threads could be started (" + error.what() + ")");
    }
}

void ThreadPool::Crew::stop() {
    {
        std::lock_guard lock(mutex);
        stopping = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
}

void ThreadPool::Crew::work(int thread) {
    uint64_t seen = 0;
    for (;;) {
        const std::function<void(int)>* current;
        {
            std::unique_lock lock(mutex);
            wake.wait(lock, [&] { return stopping || round != seen; });
            if (stopping) return;
            seen = round;
            current = function;
        }
        (*current)(thread);
        std::lock_guard lock(mutex);
        if (--running == 0) done.notify_one();
    }
}

ThreadPool::ThreadPool(int num_threads)
    : size_(num_threads), home_(getpid()), crew_(std::make_unique<Crew>(num_threads - 1)) {}

ThreadPool::~ThreadPool() { leave_other_process(); }

// A forked child has the pool's memory but none of its threads: they can be neither woken nor joined.
void ThreadPool::leave_other_process() {
    if (home_ != getpid()) (void)crew_.release();
}

void ThreadPool::run(const std::function<void(int)>& function) {
    if (home_ != getpid()) {
        leave_other_process();
        crew_ = std::make_unique<Crew>(size_ - 1);
        home_ = getpid();
    }
    Crew& crew = *crew_;
    {
        std::lock_guard lock(crew.mutex);
        crew.function = &function;
        crew.running = static_cast<int>(crew.threads.size());
        ++crew.round;
    }
    crew.wake.notify_all();
    function(0);
    std::unique_lock lock(crew.mutex);
    crew.done.wait(lock, [&] { return crew.running == 0; });
}

}  // namespace skipkernels::cpu
