// The state of the fake runtime, shared by the files that implement its functions.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace cuda_host {

// The CUDART_VERSION of the sources, from controls.cpp: all else here is compiled once for all versions.
extern const int kRuntimeVersion;

// What tests may set, with its default: an H200, but with few multiprocessors.
#define CUDA_HOST_SETTINGS(SETTING)                                                                              \
    SETTING(device_count, 1)                                                                                     \
    SETTING(driver_version, kRuntimeVersion) /* 0: no driver */                                                  \
    SETTING(compute_major, 9)                                                                                    \
    SETTING(compute_minor, 0)                                                                                    \
    SETTING(sm_count, 4)                                                                                         \
    SETTING(total_memory, int64_t{1} << 30)                                                                      \
    SETTING(free_memory, int64_t{1} << 30) /* before the first allocation */                                     \
    SETTING(l2_bytes, 60 << 20)                                                                                  \
    SETTING(shared_bytes_per_block, 48 << 10)                                                                    \
    SETTING(shared_bytes_per_block_optin, 227 << 10)                                                             \
    SETTING(shared_bytes_per_sm, 228 << 10)                                                                      \
    SETTING(threads_per_sm, 2048)                                                                                \
    SETTING(blocks_per_sm, 32)                                                                                   \
    SETTING(while_limit, 100000)       /* iterations of a WHILE node that count as endless */                    \
    SETTING(not_ready_queries, 0)      /* how often cudaEventQuery answers "not ready" at first */               \
    SETTING(asynchronous, 0)           /* 1: what is put into a stream is done row_mask somebody waits for it */ \
    SETTING(programmatic_in_bodies, 1) /* 0: a body with programmatic edges is not instantiated */

struct Settings {
#define CUDA_HOST_SETTING(name, value) int64_t name = value;
    CUDA_HOST_SETTINGS(CUDA_HOST_SETTING)
#undef CUDA_HOST_SETTING
};

struct Call {
    const char* name;
    std::string arguments;
    cudaError_t result;
};

// Objects of one kind. One that is gone, by destroy() or clear(), keeps its address: its use is noticed, and whoever
// outlived a reset, such as an engine that waits for Python's garbage collector, does not destroy another's.
template <class T>
class Registry {
  public:
    T* create() {
        objects_.push_back(std::make_unique<T>());
        live_.insert(objects_.back().get());
        return objects_.back().get();
    }
    bool has(const T* object) const { return live_.count(const_cast<T*>(object)) != 0; }
    void destroy(T* object) {
        *object = T{};
        live_.erase(object);
    }
    size_t live() const { return live_.size(); }
    const std::unordered_set<T*>& all() const { return live_; }
    void clear() {
        for (T* object : live_) *object = T{};
        live_.clear();
    }

  private:
    std::vector<std::unique_ptr<T>> objects_;
    std::unordered_set<T*> live_;
};

struct ConditionalHandle {
    CUgraph_st* graph;
    unsigned default_value;
    bool assign_default;
    bool used;  // by a node
};

struct Runtime {
    Runtime();
    ~Runtime();
    void reset();

    std::recursive_mutex mutex;  // one call at a time, kernels included
    Settings settings;
    int device = 0;  // the current one
    std::vector<Call> log;
    std::map<std::string, std::map<int64_t, cudaError_t>> injected;  // function -> calls from now -> error
    cudaError_t last_error = cudaSuccess;
    cudaError_t sticky_error = cudaSuccess;  // after a failed launch, every call returns it, as in CUDA
    std::string failure;                     // what the failed launch did wrong
    std::map<void*, size_t> device_memory, host_memory;
    // Memory that was there at a reset: nobody gets its address again, as in Registry.
    std::vector<std::unique_ptr<void, void (*)(void*)>> outlived_memory;
    std::map<const void*, int> max_shared_bytes;  // of functions, if set
    Registry<CUstream_st> streams;
    Registry<CUevent_st> events;
    Registry<CUgraph_st> graphs, bodies;  // bodies belong to a node
    Registry<CUgraphExec_st> execs;
    std::map<cudaGraphConditionalHandle, ConditionalHandle> handles;
};

extern Runtime runtime;

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    const char* separator = "";
    ((out << separator << parts, separator = ", "), ...);
    return out.str();
}

enum class Needs { nothing, device, device_even_if_it_failed };

// Every function of the API is one call(): recorded, made to fail if a test wants it so, otherwise run.
cudaError_t call(const char* name, std::string arguments, const std::function<cudaError_t()>& body,
                 Needs needs = Needs::device);
void record(const char* name, std::string arguments);  // what the device does, into the same log

// Runs launches, each of which may begin while the one before it runs, to their end.
cudaError_t run_launches(const std::vector<const Launch*>& chain);
cudaError_t fail_launch(const std::string& failure);
int64_t blocks_per_sm(const void* function, int64_t block_size, size_t shared_bytes);

// One operation of a stream or node of a graph.
struct Work {
    cudaGraphNodeType type;
    std::function<void()> run;  // all types but kernels
    std::shared_ptr<const Launch> launch;

    cudaError_t execute() const;
};

bool is_pinned(const void* p);  // device.cpp

// capture.cpp: whether a call that capture cannot see may be made now
cudaError_t check_unsafe_call();

}  // namespace cuda_host
