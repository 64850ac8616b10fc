#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#if defined(__linux__)
#    include <sys/mman.h>
#endif

#include "executor.h"

namespace skipkernels::cpu {

std::vector<double> measure_read(size_t bytes, int repeats, int num_threads, const std::string& isa) {
    using Clock = std::chrono::steady_clock;
    constexpr size_t kHugePage = size_t{2} << 20, kChunk = size_t{1} << 20;
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    std::unique_ptr<char, void (*)(void*)> data(static_cast<char*>(std::aligned_alloc(kHugePage, bytes)), std::free);
    if (!data) throw std::bad_alloc();
    advise_huge_pages(data.get(), bytes);
    const KernelSet& kernels = select_kernels(isa);
    ThreadPool pool(num_threads);
    std::memset(data.get(), 0, bytes);
    std::vector<double> seconds;
    std::atomic<uint64_t> sink{0};
    for (int repeat = 0; repeat < repeats; ++repeat) {
        // chunks are handed out as they are asked for, as the executor does: threads of unequal speed finish together
        std::atomic<size_t> next{0};
        const auto start = Clock::now();
        pool.run([&](int) {
            for (size_t at; (at = next.fetch_add(kChunk)) < bytes;) sink += kernels.read_bytes(data.get() + at, kChunk);
        });
        seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
    return seconds;
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace skipkernels::cpu
