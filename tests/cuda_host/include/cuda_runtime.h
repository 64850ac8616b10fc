// CUDA sources on the CPU: g++ compiles csrc/cuda/*.cu and *.cpp against this header, and they run, without a GPU and
// without the CUDA toolkit. What it takes to read this room:
//
//   include/cuda_host/types.h    float4, dim3, ...
//   include/cuda_host/device.h   what kernels call: __global__, threadIdx, __syncthreads, shuffles, atomics
//   include/cuda_host/math.h     what kernels compute with: __fmul_rn, __expf, __float_as_uint, ...
//   include/cuda_host/api.h      what hosts call: the part of the CUDA runtime API that csrc/cuda uses
//   include/ptx_host.h           the twin of csrc/cuda/ptx.cuh, which holds all inline PTX
//   src/fiber.*                  a CUDA thread is a fiber: a stack and a context switch of a few instructions
//   src/scheduler.*              runs the threads of a grid on one processor, in an order that a seed decides
//   src/collectives.cpp, ptx.cpp, report.cpp    where threads wait for each other; what a failed launch says
//   src/race.*                   finds accesses that nothing orders, if kernels were compiled for it
//   src/runtime.*, calls.cpp, device.cpp, stream.cpp, capture.cpp, graph.*, exec.cpp    the fake runtime: executes at
//                                once, records every call, fails calls on request, counts what was not destroyed
//   controls.cpp, controls.py    a test's hands on all of that
//   build.py                     compiles sources into a shared library, reusing what did not change
//
// Threads take turns only where they wait: at a barrier, a warp collective, an atomic. Between two of these one thread
// runs alone, as far as it gets. Seed 0 runs threads (and blocks, one at a time) in ascending order, seed 1 in
// descending order, and every other seed shuffles threads, warps and blocks, many blocks resident at once. A missing
// barrier therefore reads what another thread has not yet written under some of these seeds, and shared memory and
// cudaMalloc start out filled with NaN. Diverged or exited lanes of a collective, a __syncthreads that some threads
// never reach, and endless waiting end the launch with an error that lists who waits where. In a graph, kernels with
// programmatic edges overlap, as early as they may or not at all.
//
// Two more ways to build (build.py): sanitize=True lets AddressSanitizer see every access of a kernel; races=True fails
// every launch in which two accesses are not ordered by barriers, atomics or fences, even if this schedule was kind.
//
// Not modelled: weak memory order of single instructions, time, streams that run side by side.
#pragma once

#define CUDA_HOST 1
#ifndef CUDART_VERSION
#    define CUDART_VERSION 13000
#endif

#include "cuda_host/api.h"
#include "cuda_host/device.h"
#include "cuda_host/math.h"
#include "cuda_host/types.h"
