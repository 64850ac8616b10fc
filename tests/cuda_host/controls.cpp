// A test's hands on the fake runtime, for controls.py: plain C, so that any library carries it.
#include <cstring>
#include <string>

#include "src/graph.h"

#define CUDA_HOST_EXPORT extern "C" __attribute__((visibility("default")))

using namespace cuda_host;

const int cuda_host::kRuntimeVersion = CUDART_VERSION;

CUDA_HOST_EXPORT void cuda_host_reset(uint64_t seed) {
    const std::lock_guard lock(runtime.mutex);
    runtime.reset();
    scheduler.set_seed(seed);
}

CUDA_HOST_EXPORT void cuda_host_set_seed(uint64_t seed) {
    const std::lock_guard lock(runtime.mutex);
    scheduler.set_seed(seed);
}

// False if there is no such setting.
CUDA_HOST_EXPORT bool cuda_host_set(const char* setting, int64_t value) {
    const std::lock_guard lock(runtime.mutex);
#define CUDA_HOST_SET(name, default_value)  \
    if (std::strcmp(setting, #name) == 0) { \
        runtime.settings.name = value;      \
        return true;                        \
    }
    CUDA_HOST_SETTINGS(CUDA_HOST_SET)
#undef CUDA_HOST_SET
    return false;
}

// The `nth` call of `function` from now on returns the error of this name and does nothing. False if there is none.
CUDA_HOST_EXPORT bool cuda_host_inject(const char* function, int64_t nth, const char* error) {
    const std::lock_guard lock(runtime.mutex);
#define CUDA_HOST_INJECT(name, value, text)     \
    if (std::strcmp(error, #name) == 0) {       \
        runtime.injected[function][nth] = name; \
        return true;                            \
    }
    CUDA_HOST_ERRORS(CUDA_HOST_INJECT)
#undef CUDA_HOST_INJECT
    return false;
}

// One line for each call since the last reset: name, arguments, result, separated by tabs. Valid until the next call.
CUDA_HOST_EXPORT const char* cuda_host_log() {
    const std::lock_guard lock(runtime.mutex);
    static std::string log;
    log.clear();
    for (const Call& call : runtime.log) {
        log += call.name + ("\t" + call.arguments) + "\t" + cudaGetErrorName(call.result) + "\n";
    }
    return log.c_str();
}

CUDA_HOST_EXPORT const char* cuda_host_error_name(int error) {
    return cudaGetErrorName(static_cast<cudaError_t>(error));
}

CUDA_HOST_EXPORT void cuda_host_clear_log() {
    const std::lock_guard lock(runtime.mutex);
    runtime.log.clear();
}

// What the launch did wrong that failed, or an empty string.
CUDA_HOST_EXPORT const char* cuda_host_failure() { return runtime.failure.c_str(); }

CUDA_HOST_EXPORT int64_t cuda_host_live(const char* kind) {
    const std::lock_guard lock(runtime.mutex);
    const std::string name = kind;
    if (name == "streams") return static_cast<int64_t>(runtime.streams.live());
    if (name == "events") return static_cast<int64_t>(runtime.events.live());
    if (name == "graphs") return static_cast<int64_t>(runtime.graphs.live());
    if (name == "execs") return static_cast<int64_t>(runtime.execs.live());
    if (name == "device_memory") return static_cast<int64_t>(runtime.device_memory.size());
    if (name == "host_memory") return static_cast<int64_t>(runtime.host_memory.size());
    return -1;
}

CUDA_HOST_EXPORT uint64_t cuda_host_switches() { return scheduler.switches(); }

// A stream that does not wait for the legacy one, as torch's are.
CUDA_HOST_EXPORT cudaStream_t cuda_host_new_stream() {
    cudaStream_t stream{};
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    return stream;
}

CUDA_HOST_EXPORT int cuda_host_current_device() { return runtime.device; }
