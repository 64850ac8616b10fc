// Streams, events and what is put into streams. Outside of captures everything is done at once.
#include <algorithm>
#include <cstring>

#include "graph.h"

namespace cuda_host {

namespace {

unsigned long long volume(const dim3& size) { return 1ull * size.x * size.y * size.z; }

cudaError_t make_launch(const cudaLaunchConfig_t& config, const void* function, std::function<void()> run,
                        Launch& launch) {
    launch = {function, std::move(run), config.gridDim, config.blockDim, config.dynamicSmemBytes, false, false};
    if (!function) return cudaErrorInvalidDeviceFunction;
    if (config.numAttrs && !config.attrs) return cudaErrorInvalidValue;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config.attrs[i];
        if (attribute.id == cudaLaunchAttributeCooperative) launch.cooperative = attribute.val.cooperative;
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            launch.programmatic = attribute.val.programmaticStreamSerializationAllowed;
    }
    const auto blocks = volume(launch.grid), threads = volume(launch.block);
    if (blocks == 0 || launch.grid.x > 0x7fffffff || launch.grid.y > 65535 || launch.grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (threads == 0 || threads > 1024 || launch.block.z > 64) return cudaErrorInvalidConfiguration;
    const int64_t per_sm = blocks_per_sm(function, static_cast<int64_t>(threads), launch.shared_bytes);
    if (per_sm == 0) return cudaErrorInvalidValue;  // more shared memory than the function was allowed
    if (launch.cooperative && blocks > static_cast<unsigned long long>(per_sm * runtime.settings.sm_count))
        return cudaErrorCooperativeLaunchTooLarge;
    return cudaSuccess;
}

}  // namespace

cudaError_t fail_launch(const std::string& failure) {
    runtime.failure = "unspecified launch failure: " + failure;
    return runtime.sticky_error = cudaErrorLaunchFailure;
}

cudaError_t run_launches(const std::vector<const Launch*>& chain) {
    int64_t resident = 0;
    for (const Launch* launch : chain) {
        const auto threads = volume(launch->block);
        const auto& [x, y, z] = launch->grid;
        record("kernel", function_name(launch->function) + ", grid " + text_of(make_uint3(x, y, z)) + ", " +
                             text(threads) + " threads, " + text(launch->shared_bytes) + " bytes");
        resident = std::max(resident,
                            runtime.settings.sm_count *
                                blocks_per_sm(launch->function, static_cast<int64_t>(threads), launch->shared_bytes));
    }
    const std::string failure = scheduler.run(chain, static_cast<unsigned>(std::max<int64_t>(1, resident)));
    return failure.empty() ? cudaSuccess : fail_launch(failure);
}

cudaError_t Work::execute() const {
    if (launch) return run_launches({launch.get()});
    run();
    return cudaSuccess;
}

CUstream_st* find_stream(cudaStream_t stream) {
    static CUstream_st legacy, per_thread;
    if (stream == nullptr || stream == cudaStreamLegacy) return &legacy;
    if (stream == cudaStreamPerThread) return &per_thread;
    return runtime.streams.has(stream) ? stream : nullptr;
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return capture_work(*stream, std::move(work));
    if (const cudaError_t error = check_legacy_stream(*stream)) return error;
    return work.execute();
}

cudaError_t launch(const cudaLaunchConfig_t* config, const void* function, std::function<void()> run) {
    return call("cudaLaunchKernelEx", function_name(function), [&] {
        if (!config) return cudaErrorInvalidValue;
        auto launch = std::make_shared<Launch>();
        if (const cudaError_t error = make_launch(*config, function, std::move(run), *launch)) {
            CUstream_st* stream = find_stream(config->stream);
            return stream && stream->capture ? invalidate(*stream, error) : error;
        }
        return enqueue(config->stream, {cudaGraphNodeTypeKernel, {}, std::move(launch)});
    });
}

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return call("cudaMemcpyAsync", text(to, from, bytes, kind, stream), [=] {
        if (bytes && (!to || !from)) return cudaErrorInvalidValue;
        return enqueue(stream, {cudaGraphNodeTypeMemcpy, [=] { std::memmove(to, from, bytes); }, nullptr});
    });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return call("cudaMemcpy", text(to, from, bytes, kind), [=] {
        if (bytes && (!to || !from)) return cudaErrorInvalidValue;
        if (const cudaError_t error = check_unsafe_call()) return error;
        return enqueue(nullptr, {cudaGraphNodeTypeMemcpy, [=] { std::memmove(to, from, bytes); }, nullptr});
    });
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    return call("cudaMemsetAsync", text(p, value, bytes, stream), [=] {
        if (bytes && !p) return cudaErrorInvalidValue;
        return enqueue(stream, {cudaGraphNodeTypeMemset, [=] { std::memset(p, value, bytes); }, nullptr});
    });
}

cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    return call("cudaMemset", text(p, value, bytes), [=] {
        if (bytes && !p) return cudaErrorInvalidValue;
        if (const cudaError_t error = check_unsafe_call()) return error;
        return enqueue(nullptr, {cudaGraphNodeTypeMemset, [=] { std::memset(p, value, bytes); }, nullptr});
    });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
    return call("cudaLaunchHostFunc", text(stream), [=] {
        if (!function) return cudaErrorInvalidValue;
        return enqueue(stream, {cudaGraphNodeTypeHost, [=] { function(argument); }, nullptr});
    });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return call("cudaStreamCreateWithFlags", text(flags), [=] {
        if (!stream || flags > cudaStreamNonBlocking) return cudaErrorInvalidValue;
        *stream = runtime.streams.create();
        (*stream)->blocking = flags != cudaStreamNonBlocking;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return call(
        "cudaStreamDestroy", text(stream),
        [=] {
            if (!runtime.streams.has(stream)) return cudaErrorInvalidResourceHandle;
            if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
            runtime.streams.destroy(stream);
            return cudaSuccess;
        },
        Needs::device_even_if_it_failed);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return call("cudaStreamSynchronize", text(handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
        return check_legacy_stream(*stream);
    });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return call("cudaStreamQuery", text(handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
        return check_legacy_stream(*stream);
    });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return call("cudaEventCreateWithFlags", text(flags), [=] {
        if (!event || flags > (cudaEventBlockingSync | cudaEventDisableTiming)) return cudaErrorInvalidValue;
        *event = runtime.events.create();
        (*event)->flags = flags;
        return cudaSuccess;
    });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return call(
        "cudaEventDestroy", text(event),
        [=] {
            if (!runtime.events.has(event)) return cudaErrorInvalidResourceHandle;
            runtime.events.destroy(event);
            return cudaSuccess;
        },
        Needs::device_even_if_it_failed);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    return call("cudaEventRecord", text(event, handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream || !runtime.events.has(event)) return cudaErrorInvalidResourceHandle;
        if (stream->capture) {
            if (stream->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
            event->capture = stream->capture;
            event->dependencies = stream->dependencies;
            return cudaSuccess;
        }
        if (const cudaError_t error = check_legacy_stream(*stream)) return error;
        event->capture = nullptr;
        event->dependencies.clear();
        event->recorded = true;
        event->time = std::chrono::steady_clock::now();
        event->not_ready = runtime.settings.not_ready_queries;
        return cudaSuccess;
    });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    return call("cudaEventQuery", text(event), [=] {
        if (!runtime.events.has(event)) return cudaErrorInvalidResourceHandle;
        if (event->capture) return cudaErrorCapturedEvent;
        return event->not_ready && event->not_ready-- ? cudaErrorNotReady : cudaSuccess;
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return call("cudaEventSynchronize", text(event), [=] {
        if (!runtime.events.has(event)) return cudaErrorInvalidResourceHandle;
        if (event->capture) return cudaErrorCapturedEvent;
        event->not_ready = 0;
        return cudaSuccess;
    });
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    return call("cudaEventElapsedTime", text(start, end), [=] {
        if (!ms) return cudaErrorInvalidValue;
        for (const cudaEvent_t event : {start, end}) {
            if (!runtime.events.has(event) || !event->recorded || event->flags & cudaEventDisableTiming)
                return cudaErrorInvalidResourceHandle;
            if (event->capture) return cudaErrorCapturedEvent;
            if (event->not_ready) return cudaErrorNotReady;
        }
        *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
        return cudaSuccess;
    });
}
