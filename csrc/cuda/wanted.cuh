// The rows a kernel acts on, for kernels that read no weights before their wait.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

struct Wanted {
    const int32_t* row_mask;
    int num_rows;
    bool is_settled, triggers_early;
    Stamps stamps;

    Wanted(const Step& step, const LaunchContext& context)
        : row_mask(step.ins.row_mask),
          num_rows(static_cast<int>(step.ins.num_rows)),
          is_settled(step.flags_are_settled),
          triggers_early(step.triggers_early),
          stamps(context.stamps) {}

    // Waits for the kernel before this one and lets the next one start: the other way round where there is no row to
    // act on, as kernels.h allows. Returns whether there is one. By all threads.
    __device__ bool wait(const Clock& clock) const {
        if (!is_settled) ptx::grid_dependency_wait();
        bool any = false;
        for (int row = static_cast<int>(threadIdx.x) % 32; row < num_rows; row += 32) {
            any |= ptx::load_relaxed(row_mask + row) != 0;
        }
        any = __ballot_sync(kAllLanes, any) != 0;
        if (!any && triggers_early) ptx::grid_dependency_launch();
        ptx::grid_dependency_wait();
        if (!any) return false;
        clock.waited();
        ptx::grid_dependency_launch();
        return true;
    }
    __device__ bool has(int row) const { return row < num_rows && row_mask[row] != 0; }
};

}  // namespace skipkernels::cuda
