// Every call of the API passes here.
#include "runtime.h"

namespace cuda_host {

namespace {

cudaError_t precondition(const char* name, Needs needs) {
    const auto found = runtime.injected.find(name);
    if (found != runtime.injected.end()) {
        std::map<int64_t, cudaError_t> later;
        cudaError_t now = cudaSuccess;
        for (const auto& [calls, error] : found->second) {
            if (calls == 1) now = error;
            if (calls > 1) later[calls - 1] = error;
        }
        found->second = std::move(later);
        if (now) return now;
    }
    if (needs == Needs::nothing) return cudaSuccess;
    if (runtime.settings.driver_version / 1000 < kRuntimeVersion / 1000) return cudaErrorInsufficientDriver;
    if (runtime.settings.device_count == 0) return cudaErrorNoDevice;
    return needs == Needs::device ? runtime.sticky_error : cudaSuccess;
}

}  // namespace

cudaError_t call(const char* name, std::string arguments, const std::function<cudaError_t()>& body, Needs needs) {
    const std::lock_guard lock(runtime.mutex);
    const size_t entry = runtime.log.size();
    record(name, std::move(arguments));
    cudaError_t result = precondition(name, needs);
    if (!result) result = body();
    if (!result && needs != Needs::nothing) result = runtime.sticky_error;
    runtime.log[entry].result = result;
    if (result) runtime.last_error = result;
    return result;
}

void record(const char* name, std::string arguments) {
    runtime.log.push_back({name, std::move(arguments), cudaSuccess});
}

}  // namespace cuda_host

using namespace cuda_host;

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define CUDA_HOST_NAME(name, value, text) \
    case name:                            \
        return #name;
        CUDA_HOST_ERRORS(CUDA_HOST_NAME)
#undef CUDA_HOST_NAME
    }
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
    if (error == runtime.sticky_error && error) return runtime.failure.c_str();
    switch (error) {
#define CUDA_HOST_TEXT(name, value, text) \
    case name:                            \
        return text;
        CUDA_HOST_ERRORS(CUDA_HOST_TEXT)
#undef CUDA_HOST_TEXT
    }
    return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() {
    const std::lock_guard lock(runtime.mutex);
    record("cudaPeekAtLastError", "");
    return runtime.log.back().result = runtime.last_error;
}

cudaError_t cudaGetLastError() {
    const std::lock_guard lock(runtime.mutex);
    record("cudaGetLastError", "");
    runtime.log.back().result = runtime.last_error;
    return std::exchange(runtime.last_error, runtime.sticky_error);
}
