// Launches the instructions of one program, each as one kernel, on a stream that may be capturing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "api.h"
#include "plan.h"

namespace skipkernels::cuda {

class Launcher {
  public:
    // Checks every instruction and allocates what the kernels need beside the program's own buffers. `stamps`: null, or
    // kStamps on the device for every instruction.
    Launcher(const std::vector<Instruction>& program, int device, const Options& options, Stamps stamps);

    // One instruction alone. `programmatic`: the kernel may start while the one before it, a kernel too, still runs.
    void launch(int64_t index, cudaStream_t stream, bool programmatic) const;
    // The same where all of them are launched, one after the other: false where the next one's kernel will do it.
    bool launch_in_step(int64_t index, cudaStream_t stream, bool programmatic) const;
    int64_t size() const { return static_cast<int64_t>(steps_.size()); }

  private:
    const Step& at(int64_t index) const;
    void launch(const Step& step, int64_t index, cudaStream_t stream, bool programmatic) const;

    int device_, num_sms_ = 0, carveout_ = -1;
    Stamps stamps_;
    bool has_programmatic_launch_ = false;  // from compute capability 9.0 on
    std::vector<Step> steps_;
    // One of each for all instructions: each touches them only once those before it are complete.
    DeviceMemory arrivals_, scratch_;
};

}  // namespace skipkernels::cuda
