#include "streams.h"

#include "api.h"

namespace skipkernels::cuda {

void synchronize(cudaStream_t stream, int device) {
    const OnDevice on(device);
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

bool is_busy(cudaStream_t stream, int device) {
    const OnDevice on(device);
    const cudaError_t status = cudaStreamQuery(stream);
    if (status == cudaErrorNotReady) {
        cudaGetLastError();  // an answer, which must not show up in the next call
        return true;
    }
    check(status, "cudaStreamQuery");
    return false;
}

bool is_capturing(cudaStream_t stream, int device) {
    const OnDevice on(device);
    cudaStreamCaptureStatus capture{};
    const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
    if (status == cudaErrorStreamCaptureImplicit) {  // the default stream, while a stream that it waits for is captured
        cudaGetLastError();
        return true;
    }
    check(status, "cudaStreamIsCapturing");
    return capture != cudaStreamCaptureStatusNone;
}

}  // namespace skipkernels::cuda
