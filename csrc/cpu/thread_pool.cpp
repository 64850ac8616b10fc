#include "thread_pool.h"

namespace skipkernels::cpu {

ThreadPool::ThreadPool(int num_threads) {
    for (int thread = 1; thread < num_threads; ++thread) workers_.emplace_back(&ThreadPool::work, this, thread);
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& function) {
    {
        std::lock_guard lock(mutex_);
        function_ = &function;
        running_ = static_cast<int>(workers_.size());
        ++round_;
    }
    wake_.notify_all();
    function(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
}

void ThreadPool::work(int thread) {
    uint64_t seen = 0;
    for (;;) {
        const std::function<void(int)>* function;
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
            if (stopping_) return;
            seen = round_;
            function = function_;
        }
        (*function)(thread);
        std::lock_guard lock(mutex_);
        if (--running_ == 0) done_.notify_one();
    }
}

}  // namespace skipkernels::cpu
