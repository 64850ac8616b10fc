// The CUDA runtime's calls as this project uses them: errors become exceptions, and signatures that changed with
// CUDA 13.0 stand here once.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <sstream>
#include <stdexcept>

namespace skipkernels::cuda {

// A failed call of the runtime. Python sees a DeviceError.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A graph was captured, and the driver does not take it as it is.
struct InstantiationError : Error {
    using Error::Error;
};

template <class Failure = Error>
void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a failure that is not sticky must not show up in the next call
    std::ostringstream message;
    message << what << ": " << cudaGetErrorName(status) << " (" << cudaGetErrorString(status) << ")";
    throw Failure(message.str());
}

// Makes `device` the current one for a scope, and then the user's own again. A launch, an allocation and the stream
// whose handle is 0 all belong to the device that is current.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device == before_) return;
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

struct FreeDevice {
    void operator()(void* memory) const { cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, FreeDevice>;

inline DeviceMemory allocate(size_t bytes) {
    void* memory = nullptr;
    if (bytes) check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return DeviceMemory(memory);
}

// The graph a stream is being captured into, and the nodes its next one will depend on.
struct CapturePoint {
    cudaGraph_t graph;
    const cudaGraphNode_t* dependencies;
    size_t num_dependencies;
};

inline CapturePoint capture_point(cudaStream_t stream) {
    CapturePoint point{};
    cudaStreamCaptureStatus status{};
#if CUDART_VERSION >= 13000
    check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &point.graph, &point.dependencies, nullptr,
                                   &point.num_dependencies),
          "cudaStreamGetCaptureInfo");
#else
    check(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &point.graph, &point.dependencies,
                                      &point.num_dependencies),
          "cudaStreamGetCaptureInfo");
#endif
    if (status != cudaStreamCaptureStatusActive) throw Error("the stream is not being captured, or its capture failed");
    return point;
}

inline cudaGraphNode_t add_node(const CapturePoint& point, cudaGraphNodeParams& params) {
    cudaGraphNode_t node{};
#if CUDART_VERSION >= 13000
    check(cudaGraphAddNode(&node, point.graph, point.dependencies, nullptr, point.num_dependencies, &params),
          "cudaGraphAddNode");
#else
    check(cudaGraphAddNode(&node, point.graph, point.dependencies, point.num_dependencies, &params),
          "cudaGraphAddNode");
#endif
    return node;
}

// Makes `node` the only dependency of what is captured next.
inline void continue_after(cudaStream_t stream, cudaGraphNode_t node) {
#if CUDART_VERSION >= 13000
    check(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies),
          "cudaStreamUpdateCaptureDependencies");
#else
    check(cudaStreamUpdateCaptureDependencies(stream, &node, 1, cudaStreamSetCaptureDependencies),
          "cudaStreamUpdateCaptureDependencies");
#endif
}

}  // namespace skipkernels::cuda
