// The CUDA kernels of the instruction set, as the executor sees them: check an instruction once, then launch it as
// often as wanted, in a capture or outside.
//
// Kernels overlap where LaunchContext says so (programmatic dependent launch), under these rules:
//   - every kernel waits for the end of the one before it before it touches what that one may have written;
//   - every kernel but skip_gate lets the next one start only after its own wait. So when a kernel starts, all but the
//     one before it (and, if that is a skip_gate, the one before that) have ended, and what they wrote may be read at
//     once: caches of earlier steps, positions, and flags where Step::flags_are_settled says so. That is how a kernel
//     can load its first weights while the one before it still runs, and yet touch none that will be skipped.
#pragma once

#include <cuda_runtime.h>

#include "program.h"

namespace skipkernels::cuda {

constexpr int kRowsOfPass = 16;      // that a matrix kernel takes at a time
constexpr int kRowsPerPartial = 16;  // channels of one similarity partial
constexpr int kKvSplit = 64;         // positions of one split of attention

struct LaunchContext {
    cudaStream_t stream;
    int num_sms;
    bool programmatic;  // the kernel may start before the one before it has ended
};

struct WeightRange {
    const void* data;
    int64_t bytes;
};

// What blocks of decode_attention that have no keys to attend to bring into the second-level cache.
struct Prefetch {
    WeightRange always;
    const int32_t* run_ffn;  // (batch_size): the layer's own flags
    int64_t batch_size;
    WeightRange if_run;     // where any row of run_ffn is set,
    WeightRange otherwise;  // and where none is
    int64_t max_bytes;      // in all; 0 is off
};

struct Step {
    Instruction ins;
    Prefetch prefetch;       // decode_attention
    bool flags_are_settled;  // the instruction before this one, and behind a skip_gate the one before that, do not
                             // may_write_flags() of this one; false is always correct
    int32_t* arrivals;       // num_arrivals(ins) counters, zero before the first launch and after each
    float* scratch;          // scratch_floats(ins) floats, 16-byte aligned, nobody else's during the launch
};

// Whether `ins` can change what tells `reader` which rows to act on, and how long they are.
bool may_write_flags(const Instruction& ins, const Instruction& reader);

int64_t num_arrivals(const Instruction& ins);
int64_t scratch_floats(const Instruction& ins);

// Throws std::invalid_argument for what the kernels cannot do.
void check(const Instruction& ins);

// Asynchronous: allocates nothing and waits for nothing.
cudaError_t launch(const Step& step, const LaunchContext& context);

}  // namespace skipkernels::cuda
