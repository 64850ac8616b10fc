// The CUDA kernels of the instruction set, as the executor sees them: check an instruction once, then launch it as
// often as wanted, in a capture or outside.
//
// Kernels overlap where LaunchContext says so (programmatic dependent launch), under these rules:
//   - every kernel waits for the end of the one before it before it touches what that one may have written;
//   - every kernel lets the next one start only after its own wait, but for skip_gate, and for kernels of matrices and
//     of neurons that have no row to act on. So when a kernel starts, all but the one before it (and, behind such a
//     one, those before that) have ended, and what they wrote may be read at once: caches of earlier steps, positions,
//     and flags where Step::flags_are_settled says so. That is how a kernel can load its first weights while the one
//     before it still runs, and yet touch none that will be skipped.
#pragma once

#include <cuda_runtime.h>

#include "program.h"

namespace skipkernels::cuda {

constexpr int kRowsOfPass = 16;      // that a matrix kernel takes at a time
constexpr int kMostRows = 2048;      // whose positions attention can hold in shared memory beside its own
constexpr int kRowsPerPartial = 16;  // channels of one similarity partial
// How L2 treats what is read, in the encoding of the hardware as libcu++ has it (access_property).
// Weights are read once a step and had better leave before all else.
constexpr uint64_t kEvictNormal = 0x10F0000000000000, kEvictFirst = 0x12F0000000000000;

constexpr int kKvSplit = 64;  // positions of one split of attention

// When a kernel began, when its first block had waited for the one before it, and when its last block ended, in
// nanoseconds of the device's clock; {~0, ~0, 0} before the launch. Null: nobody wants to know.
using Stamps = unsigned long long*;
constexpr int kStamps = 3;

struct LaunchContext {
    cudaStream_t stream = nullptr;
    int num_sms = 1;
    bool programmatic = false;  // the kernel may start before the one before it has ended
    int carveout = -1;          // share of L1 to be shared memory, in percent; -1: the driver's choice
    Stamps stamps = nullptr;
};

struct WeightRange {
    const void* data;
    int64_t bytes;
};

// What blocks bring into L2 that have nothing else to do: those of decode_attention without keys to
// attend to, and more than sample needs.
struct Prefetch {
    WeightRange always;
    const int32_t* run_ffn;  // (num_rows): the layer's own flags; of sample none
    int64_t num_rows;
    WeightRange if_run;     // where any row of run_ffn is set,
    WeightRange otherwise;  // and where none is
    int64_t max_bytes;      // in all; 0 is off
};

struct Step {
    Instruction ins;
    Prefetch prefetch;       // decode_attention, sample
    bool flags_are_settled;  // no instruction that may still run when this one starts may_write_flags() of this one;
                             // false is always correct
    bool triggers_early;     // without a row: before the wait
    bool evicts_first;       // weights, from L2
    bool touches_settled;    // before the wait
    bool prefetches_early;   // before the wait
    bool is_taken_along;     // a skip_gate that the next kernel makes, where whole programs are launched
    bool takes_gate_along;   // this is that kernel:
    SkipGate gate;
    int32_t* arrivals;  // num_arrivals(ins) counters, zero before the first launch and after each
    float* scratch;     // scratch_floats(ins) floats, 16-byte aligned, nobody else's during the launch
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
