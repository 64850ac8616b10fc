"""The fake runtime around kernels: errors on request, leaks, limits of the device, what a call leaves in the log."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.cuda_host.api import Api
from tests.cuda_host.build import build_host_extension
from tests.cuda_host.controls import Call, HostRuntime

SOURCE = Path(__file__).parent / "kernels" / "graph.cu"
OK = "cudaSuccess"


@pytest.fixture(scope="module")
def library():
    return HostRuntime(build_host_extension([SOURCE]))


@pytest.fixture
def api(library):
    library.reset()
    return Api(library)


def integer(value=0):
    return torch.tensor([value], dtype=torch.int32)


def read_int(function, *arguments):
    value = ctypes.c_int(-1)
    return function(ctypes.byref(value), *arguments), value.value


def test_the_log_holds_every_call_and_kernel(api):
    stream, x = api.stream(), integer()
    api.runtime.clear_log()
    api.launch_add(stream, x, 1)
    api.cudaStreamSynchronize(stream)
    api.cudaStreamSynchronize(77)
    assert api.runtime.log == [
        Call("cudaLaunchKernelEx", "add", OK),
        Call("kernel", "add, grid (1,1,1), 1 threads, 0 bytes", OK),
        Call("cudaStreamSynchronize", hex(stream), OK),
        Call("cudaStreamSynchronize", "0x4d", "cudaErrorInvalidResourceHandle"),
    ]


def test_what_outlives_a_reset_destroys_nobody_elses(api):
    """Engines that Python's garbage collector finds late destroyed what a later test had at the same address."""
    kinds = {
        "device_memory": (lambda: api.new("cudaMalloc", 64), api.cudaFree),
        "host_memory": (lambda: api.new("cudaMallocHost", 64), api.cudaFreeHost),
        "streams": (api.stream, api.cudaStreamDestroy),
        "events": (lambda: api.new("cudaEventCreateWithFlags", 0), api.cudaEventDestroy),
        "graphs": (lambda: api.new("cudaGraphCreate", 0), api.cudaGraphDestroy),
    }
    outlived = {kind: [create() for _ in range(50)] for kind, (create, _) in kinds.items()}
    api.runtime.reset()
    for kind, (create, _) in kinds.items():
        assert not set(outlived[kind]) & {create() for _ in range(50)}, kind
    assert api.runtime.live == dict.fromkeys(kinds, 50)
    for kind, (_, destroy) in kinds.items():
        assert {destroy(p) for p in outlived[kind]} <= {"cudaErrorInvalidValue", "cudaErrorInvalidResourceHandle"}
    assert api.runtime.live == dict.fromkeys(kinds, 50)


def test_an_injected_error_replaces_the_nth_call(api):
    api.runtime.inject("cudaMalloc", "cudaErrorMemoryAllocation", nth=2)
    out = ctypes.c_void_p()
    errors = [api.cudaMalloc(ctypes.byref(out), 16) for _ in range(3)]
    assert errors == [OK, "cudaErrorMemoryAllocation", OK]
    assert api.runtime.live == {"device_memory": 2}


def test_an_injected_launch_failure_runs_nothing(api):
    x = integer()
    api.runtime.inject("cudaLaunchKernelEx", "cudaErrorIllegalAddress")
    assert api.launch_add(0, x, 1) == "cudaErrorIllegalAddress"
    assert (x.item(), api.runtime.kernels) == (0, [])
    assert api.launch_add(0, x, 1) == OK


def test_unknown_names_are_refused(api):
    with pytest.raises(ValueError, match="no error is named 'cudaErrorOops'"):
        api.runtime.inject("cudaMalloc", "cudaErrorOops")
    with pytest.raises(ValueError, match="no setting is named 'sms'"):
        api.runtime.configure(sms=3)


def test_the_last_error_stays_until_read(api):
    assert api.cudaFree(4711) == "cudaErrorInvalidValue"
    assert api.cudaSetDevice(0) == OK
    assert [api.cudaPeekAtLastError(), api.cudaGetLastError(), api.cudaGetLastError()] == [
        "cudaErrorInvalidValue",
        "cudaErrorInvalidValue",
        OK,
    ]


def test_live_objects_are_counted(api):
    objects = {
        "cudaStreamDestroy": api.stream(),
        "cudaEventDestroy": api.new("cudaEventCreateWithFlags", 0),
        "cudaFree": api.new("cudaMalloc", 100),
        "cudaFreeHost": api.new("cudaMallocHost", 100),
    }
    graph = api.new("cudaGraphCreate", 0)
    objects["cudaGraphExecDestroy"] = api.new("cudaGraphInstantiate", graph, 0)
    objects["cudaGraphDestroy"] = graph
    assert api.runtime.live == dict.fromkeys(HostRuntime.KINDS, 1)
    for destroy, value in objects.items():
        assert getattr(api, destroy)(value) == OK
    assert api.runtime.live == {}


def test_memory_starts_as_nan(api):
    for allocate in ("cudaMalloc", "cudaMallocHost"):
        memory = api.new(allocate, 16)
        assert memory % 256 == 0
        assert bytes((ctypes.c_ubyte * 16).from_address(memory)) == b"\xff" * 16


def test_host_memory_is_mapped_and_nothing_else_is(api):
    memory, device = api.new("cudaMallocHost", 64), ctypes.c_void_p()
    assert api.new("cudaHostGetDevicePointer", memory + 63, 0) == memory + 63
    for pointer in (memory + 64, memory - 1, integer().data_ptr()):
        assert api.cudaHostGetDevicePointer(ctypes.byref(device), pointer, 0) == "cudaErrorInvalidValue"


def test_memory_runs_out(api):
    api.runtime.configure(total_memory=1000, free_memory=300)
    free, total, out = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
    api.new("cudaMalloc", 100)
    assert api.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == OK
    assert (free.value, total.value) == (200, 1000)
    assert api.cudaMalloc(ctypes.byref(out), 201) == "cudaErrorMemoryAllocation"
    assert api.cudaMalloc(ctypes.byref(out), 200) == OK


def test_without_a_device_only_versions_are_known(api):
    api.runtime.configure(device_count=0)
    assert read_int(api.cudaGetDeviceCount) == ("cudaErrorNoDevice", 0)
    assert api.cudaSetDevice(0) == "cudaErrorNoDevice"
    assert read_int(api.cudaDriverGetVersion) == (OK, 13000)


@pytest.mark.parametrize(("driver", "error"), [(0, True), (12080, True), (13000, False), (13010, False)])
def test_the_driver_must_not_be_older_than_the_runtime(api, driver, error):
    api.runtime.configure(driver_version=driver)
    expected = "cudaErrorInsufficientDriver" if error else OK
    assert read_int(api.cudaGetDeviceCount) == (expected, 0 if error else 1)
    assert read_int(api.cudaDriverGetVersion) == (OK, driver)
    assert read_int(api.cudaRuntimeGetVersion) == (OK, 13000)


def test_device_attributes_follow_the_settings(api):
    api.runtime.configure(sm_count=7, compute_major=8, compute_minor=6)
    values = [read_int(api.cudaDeviceGetAttribute, attribute, 0) for attribute in (16, 75, 76)]
    assert values == [(OK, 7), (OK, 8), (OK, 6)]
    assert read_int(api.cudaDeviceGetAttribute, 16, 1)[0] == "cudaErrorInvalidDevice"


def test_more_than_48_kb_of_shared_memory_must_be_asked_for(api):
    x = integer()
    assert api.launch_with_shared_bytes(x, 48 << 10) == OK
    assert api.launch_with_shared_bytes(x, (48 << 10) + 1) == "cudaErrorInvalidValue"
    assert api.allow_shared_bytes((227 << 10) + 1) == "cudaErrorInvalidValue"
    assert api.allow_shared_bytes(100 << 10) == OK
    assert api.launch_with_shared_bytes(x, 100 << 10) == OK
    assert x.item() == 2


def test_occupancy(api):
    assert read_int(api.max_blocks_per_sm, 256, 0) == (OK, 8)
    assert read_int(api.max_blocks_per_sm, 33, 0) == (OK, 32)
    assert read_int(api.max_blocks_per_sm, 256, 100 << 10) == (OK, 0)
    api.allow_shared_bytes(100 << 10)
    assert read_int(api.max_blocks_per_sm, 256, 100 << 10) == (OK, 2)


def test_events_are_ready_when_the_setting_says_so(api):
    api.runtime.configure(not_ready_queries=2)
    event = api.new("cudaEventCreateWithFlags", 2)
    assert api.cudaEventQuery(event) == OK, "never recorded"
    api.cudaEventRecord(event, 0)
    assert [api.cudaEventQuery(event) for _ in range(3)] == ["cudaErrorNotReady", "cudaErrorNotReady", OK]
    api.cudaEventRecord(event, 0)
    assert [api.cudaEventSynchronize(event), api.cudaEventQuery(event)] == [OK, OK]


def test_events_measure_time_unless_told_not_to(api):
    start, end, untimed = (api.new("cudaEventCreateWithFlags", flags) for flags in (0, 0, 2))
    ms = ctypes.c_float(-1)
    for event in (start, end, untimed):
        api.cudaEventRecord(event, 0)
    assert api.cudaEventElapsedTime(ctypes.byref(ms), start, end) == OK
    assert ms.value >= 0
    assert api.cudaEventElapsedTime(ctypes.byref(ms), start, untimed) == "cudaErrorInvalidResourceHandle"


def test_copies_and_fills(api):
    x, y = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    assert api.cudaMemcpy(y, x, 16, 3) == OK
    assert api.cudaMemsetAsync(x, 0, 4, 0) == OK
    assert (y.tolist(), x.tolist()) == ([0, 1, 2, 3, 0, 0, 0, 0], list(range(8)))
    assert api.cudaMemcpy(0, x, 16, 3) == "cudaErrorInvalidValue"
