#include "launcher.h"

#include <algorithm>
#include <string>

#include "../checks.h"
#include "device.h"

namespace skipkernels::cuda {

namespace {

constexpr int64_t kMostPrefetched = 15 << 20;  // what an H100 reads during a short attention of a large model

}  // namespace

Launcher::Launcher(const std::vector<Instruction>& program, int device, const Options& options, Stamps stamps)
    : device_(device), stamps_(stamps) {
    const OnDevice on(device_);
    num_sms_ = attribute_of(device_, cudaDevAttrMultiProcessorCount);
    has_programmatic_launch_ = attribute_of(device_, cudaDevAttrComputeCapabilityMajor) >= 9;
    if (options.one_carveout) carveout_ = carveout_of(device_);
    int64_t max_prefetch_bytes = options.max_prefetch_bytes;
    // what is prefetched must still be there when it is read
    if (max_prefetch_bytes < 0) {
        max_prefetch_bytes = std::min<int64_t>(attribute_of(device_, cudaDevAttrL2CacheSize) / 2, kMostPrefetched);
    }
    for (const Instruction& ins : program) cuda::check(ins);
    steps_ = plan_steps(program, options, max_prefetch_bytes);
    int64_t arrivals = 0, scratch = 0;
    for (const Step& step : steps_) {
        arrivals = std::max(arrivals, num_arrivals(step.ins));
        scratch = std::max(scratch, scratch_floats(step.ins));
    }
    arrivals_ = allocate(arrivals * sizeof(int32_t));
    if (arrivals) check(cudaMemset(arrivals_.get(), 0, arrivals * sizeof(int32_t)), "cudaMemset");
    // a memset is asynchronous, and the streams of later launches need not be ordered behind it
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    scratch_ = allocate(scratch * sizeof(float));
    for (Step& step : steps_) {
        step.arrivals = static_cast<int32_t*>(arrivals_.get());
        step.scratch = static_cast<float*>(scratch_.get());
    }
}

void Launcher::launch(int64_t index, cudaStream_t stream, bool programmatic) const {
    Step step = at(index);
    step.takes_gate_along = false;
    launch(step, index, stream, programmatic);
}

bool Launcher::launch_in_step(int64_t index, cudaStream_t stream, bool programmatic) const {
    const Step& step = at(index);
    if (step.is_taken_along) return false;
    launch(step, index, stream, programmatic);
    return true;
}

const Step& Launcher::at(int64_t index) const {
    skipkernels::check(index >= 0 && index < size(), "instruction ", index, " is outside 0..", size() - 1);
    return steps_[static_cast<size_t>(index)];
}

void Launcher::launch(const Step& step, int64_t index, cudaStream_t stream, bool programmatic) const {
    const OnDevice on(device_);
    const Stamps stamps = stamps_ ? stamps_ + index * kStamps : nullptr;
    const LaunchContext context{stream, num_sms_, programmatic && has_programmatic_launch_, carveout_, stamps};
    const std::string_view name = kInstructionSet[static_cast<size_t>(step.ins.op)].name;
    check(cuda::launch(step, context), std::string(name).c_str());
}

}  // namespace skipkernels::cuda
