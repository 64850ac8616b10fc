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

namespace {

std::map<int, CUstream_st> legacy_streams, per_thread_streams;  // of each device
uint64_t last_pending = 0;

CUstream_st* of_device(std::map<int, CUstream_st>& streams) {
    CUstream_st& stream = streams[runtime.device];
    stream.device = runtime.device;
    return &stream;
}

cudaError_t drain_up_to(CUstream_st& stream, uint64_t number);

// What an operation of the stream waits for although it is in another: the legacy stream and all blocking ones.
cudaError_t drain_others(CUstream_st& stream, uint64_t number) {
    const auto legacy = legacy_streams.find(stream.device);
    const bool is_legacy = legacy != legacy_streams.end() && &legacy->second == &stream;
    if (!is_legacy) {
        if (!stream.blocking || legacy == legacy_streams.end()) return cudaSuccess;
        return drain_up_to(legacy->second, number);
    }
    for (CUstream_st* other : runtime.streams.all()) {
        if (!other->blocking || other->device != stream.device) continue;
        if (const cudaError_t error = drain_up_to(*other, number)) return error;
    }
    return cudaSuccess;
}

cudaError_t run_first(CUstream_st& stream) {
    const Pending first = std::move(stream.pending.front());
    stream.pending.pop_front();
    if (const cudaError_t error = drain_others(stream, first.number)) return error;
    return first.run();
}

cudaError_t drain_up_to(CUstream_st& stream, uint64_t number) {
    while (!stream.pending.empty() && stream.pending.front().number <= number) {
        if (const cudaError_t error = run_first(stream)) return error;
    }
    return cudaSuccess;
}

}  // namespace

// A handle names a stream of the device it was made on; 0 names the legacy stream of the current device.
CUstream_st* find_stream(cudaStream_t stream) {
    if (stream == nullptr || stream == cudaStreamLegacy) return of_device(legacy_streams);
    if (stream == cudaStreamPerThread) return of_device(per_thread_streams);
    return runtime.streams.has(stream) ? stream : nullptr;
}

cudaError_t submit(CUstream_st& stream, std::function<cudaError_t()> run) {
    if (stream.device != runtime.device) return cudaErrorInvalidResourceHandle;
    if (!runtime.settings.asynchronous) return run();
    stream.pending.push_back({++last_pending, std::move(run)});
    return cudaSuccess;
}

cudaError_t drain(CUstream_st& stream) {
    if (const cudaError_t error = drain_others(stream, last_pending)) return error;
    return drain_up_to(stream, last_pending);
}

cudaError_t drain_all() {
    for (auto* streams : {&legacy_streams, &per_thread_streams}) {
        for (auto& [device, stream] : *streams) {
            if (const cudaError_t error = drain(stream)) return error;
        }
    }
    for (CUstream_st* stream : runtime.streams.all()) {
        if (const cudaError_t error = drain(*stream)) return error;
    }
    return cudaSuccess;
}

void forget_streams() {
    legacy_streams.clear();
    per_thread_streams.clear();
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return capture_work(*stream, std::move(work));
    if (const cudaError_t error = check_legacy_stream(*stream)) return error;
    return submit(*stream, [work = std::move(work)] { return work.execute(); });
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
        if (kind == cudaMemcpyHostToDevice && runtime.settings.asynchronous && !is_pinned(from)) {
            // pageable memory is staged before the call returns
            const std::vector<char> staged(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
            return enqueue(stream, {cudaGraphNodeTypeMemcpy, [=] { std::memcpy(to, staged.data(), bytes); }, nullptr});
        }
        return enqueue(stream, {cudaGraphNodeTypeMemcpy, [=] { std::memmove(to, from, bytes); }, nullptr});
    });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return call("cudaMemcpy", text(to, from, bytes, kind), [=] {
        if (bytes && (!to || !from)) return cudaErrorInvalidValue;
        if (const cudaError_t error = check_unsafe_call()) return error;
        const cudaError_t error =
            enqueue(nullptr, {cudaGraphNodeTypeMemcpy, [=] { std::memmove(to, from, bytes); }, nullptr});
        return error ? error : drain(*find_stream(nullptr));
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
        (*stream)->device = runtime.device;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return call(
        "cudaStreamDestroy", text(stream),
        [=] {
            if (!runtime.streams.has(stream)) return cudaErrorInvalidResourceHandle;
            if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
            const cudaError_t error = drain(*stream);
            runtime.streams.destroy(stream);
            return error;
        },
        Needs::device_even_if_it_failed);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return call("cudaStreamSynchronize", text(handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
        if (const cudaError_t error = check_legacy_stream(*stream)) return error;
        return drain(*stream);
    });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return call("cudaStreamQuery", text(handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureUnsupported);
        if (const cudaError_t error = check_legacy_stream(*stream)) return error;
        if (stream->pending.empty()) return cudaSuccess;
        const cudaError_t error = run_first(*stream);  // time passes between two questions
        return error ? error : cudaErrorNotReady;
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
        if (const cudaError_t error = drain(*stream)) return error;  // events are reached at once
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
