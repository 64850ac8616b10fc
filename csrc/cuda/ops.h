// The launcher of every op, one a file: <op>.cu.
#pragma once

#include "kernels.h"

namespace skipkernels::cuda {

#define SKIPKERNELS_LAUNCHER(op, Struct, FIELDS) \
    cudaError_t launch_##op(const Step& step, const LaunchContext& context);
SKIPKERNELS_OPS(SKIPKERNELS_LAUNCHER)
#undef SKIPKERNELS_LAUNCHER

int64_t sample_scratch_floats(const Sample& op);
int64_t select_neurons_scratch_floats(const SelectNeurons& op);
int64_t down_proj_neurons_add_scratch_floats(const DownProjNeuronsAdd& op);
int64_t down_proj_neurons_add_arrivals(const DownProjNeuronsAdd& op);

}  // namespace skipkernels::cuda
