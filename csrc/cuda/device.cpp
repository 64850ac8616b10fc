#include "device.h"

#include <algorithm>

#include "api.h"

namespace skipkernels::cuda {

namespace {

constexpr int kCarveoutBytes = 164 << 10;  // twice 66 KB, and what the driver keeps of each, up to a size that exists

}  // namespace

int attribute_of(int device, cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

int carveout_of(int device) {
    const int most = attribute_of(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    // rounded down, for the driver takes the next larger size that exists
    return static_cast<int>(std::min<int64_t>(100, int64_t{100} * kCarveoutBytes / most));
}

}  // namespace skipkernels::cuda
