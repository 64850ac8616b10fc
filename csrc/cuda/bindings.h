#pragma once

#include <pybind11/pybind11.h>

namespace skipkernels::cuda {

// Adds CudaLauncher, CudaGraph and cuda_status to the module.
void bind(pybind11::module_& m);

}  // namespace skipkernels::cuda
