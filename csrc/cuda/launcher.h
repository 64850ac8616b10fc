// Launches the instructions of one program, each as one kernel, on a stream that may be capturing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "kernels.h"

namespace skipkernels::cuda {

class Launcher {
  public:
    // Checks every instruction and allocates what the kernels need beside the program's own buffers. At most
    // max_prefetch_bytes of weights are brought into the second-level cache ahead of their use; -1: as the device
    // suits.
    Launcher(const std::vector<Instruction>& program, int device, int64_t max_prefetch_bytes);

    // `programmatic`: the kernel may start while the one before it, a kernel too, still runs.
    void launch(int64_t index, cudaStream_t stream, bool programmatic) const;
    int64_t size() const { return static_cast<int64_t>(steps_.size()); }

  private:
    int device_, num_sms_ = 0;
    bool has_programmatic_launch_ = false;  // from compute capability 9.0 on
    std::vector<Step> steps_;
    // One of each for all instructions: each touches them only once those before it are complete.
    DeviceMemory arrivals_, scratch_;
};

}  // namespace skipkernels::cuda
