"""Capture, conditional nodes and what CUDA forbids, on the fake runtime; in the signatures of CUDA 13.0 and of 12.4."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cuda_host.api import ASSIGN_DEFAULT, GLOBAL, IF, RELAXED, THREAD_LOCAL, WHILE, Api
from tests.cuda_host.build import build_host_extension
from tests.cuda_host.controls import SEEDS, HostRuntime

SOURCE = Path(__file__).parent / "kernels" / "graph.cu"
OK = "cudaSuccess"


@pytest.fixture(scope="module", params=[13000, 12040], ids=["cuda-13.0", "cuda-12.4"])
def library(request):
    return HostRuntime(build_host_extension([SOURCE], cuda_version=request.param))


@pytest.fixture
def api(library):
    library.reset()
    return Api(library)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_capture_executes_nothing_until_launched(api):
    x, stream = integers(1), api.stream()
    api.begin_capture(stream)
    assert api.launch_add(stream, x, 2) == OK
    assert api.launch_multiply(stream, x, 10) == OK
    assert api.cudaMemcpyAsync(x[:0], x, 0, 3, stream) == OK
    graph = api.end_capture(stream)
    assert (x.item(), api.runtime.kernels) == (1, [])
    for expected in (30, 320):
        assert api.launch_graph(graph, stream) == OK
        assert x.item() == expected
    assert api.runtime.kernels == ["add", "multiply"] * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_forked_streams_keep_their_dependencies(api, seed):
    """x and y are computed side by side, then added; x = (1 + 2) * 10, y = 5 * 3."""
    api.runtime.reset(seed=seed)
    x, y, stream, other = integers(1), integers(5), api.stream(), api.stream()
    fork, join = (api.new("cudaEventCreateWithFlags", 2) for _ in range(2))
    api.begin_capture(stream)
    for call, *arguments in [
        ("launch_add", stream, x, 2),
        ("cudaEventRecord", fork, stream),
        ("cudaStreamWaitEvent", other, fork, 0),
        ("launch_multiply", other, y, 3),
        ("launch_multiply", stream, x, 10),
        ("cudaEventRecord", join, other),
        ("cudaStreamWaitEvent", stream, join, 0),
        ("cudaMemcpyAsync", x, y, 4, 3, stream),
        ("launch_add", stream, x, 100),
    ]:
        assert getattr(api, call)(*arguments) == OK, call
    assert api.launch_graph(api.end_capture(stream), stream) == OK
    assert (x.item(), y.item()) == (115, 15)


def test_independent_nodes_run_in_an_order_of_the_seed(api):
    results = []
    for seed in range(10):
        api.runtime.reset(seed=seed)
        x, stream, other = integers(1), api.stream(), api.stream()
        fork, join = (api.new("cudaEventCreateWithFlags", 2) for _ in range(2))
        api.begin_capture(stream)
        api.cudaEventRecord(fork, stream)
        api.cudaStreamWaitEvent(other, fork, 0)
        api.launch_add(stream, x, 1)
        api.launch_multiply(other, x, 10)
        api.cudaEventRecord(join, other)
        api.cudaStreamWaitEvent(stream, join, 0)
        assert api.launch_graph(api.end_capture(stream), stream) == OK
        results.append(x.item())
    assert results[:2] == [20, 11]
    assert set(results[2:]) == {20, 11}


def capture_if(api, stream, flag, x, *, set_condition=True, default=0, flags=ASSIGN_DEFAULT):
    """x += 1; if flag: x *= 10; x += 2"""
    body_stream = api.stream()
    api.begin_capture(stream)
    api.launch_add(stream, x, 1)
    graph = api.new("get_capture_graph", first=stream)
    handle = api.new("cudaGraphConditionalHandleCreate", graph, default, flags)
    if set_condition:
        assert api.launch_set_condition(stream, handle, flag, 1) == OK
    body = ctypes.c_void_p()
    assert api.add_conditional(stream, handle, IF, ctypes.byref(body)) == OK
    assert api.cudaStreamBeginCaptureToGraph(body_stream, body, 0, 0, 0, GLOBAL) == OK
    api.launch_multiply(body_stream, x, 10)
    assert api.end_capture(body_stream) == body.value
    api.launch_add(stream, x, 2)
    return api.end_capture(stream)


def test_an_if_node_runs_its_body_where_the_kernel_said_so(api):
    flag, x, stream = integers(0), integers(0), api.stream()
    exec_ = api.new("cudaGraphInstantiate", capture_if(api, stream, flag, x), 0)
    results = []
    for wanted in (0, 1, 7, 0):
        flag.fill_(wanted)
        x.fill_(4)
        assert api.cudaGraphLaunch(exec_, stream) == OK
        results.append(x.item())
    assert results == [7, 52, 52, 7]
    assert [call.arguments for call in api.runtime.log if call.name == "if"] == ["0", "1", "7", "0"]


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_of_a_handle_holds_from_launch_to_launch(api, default):
    x, stream = integers(0), api.stream()
    graph = capture_if(api, stream, x, x, set_condition=False, default=default)
    for _ in range(2):
        x.fill_(0)
        assert api.launch_graph(graph, stream) == OK
        assert x.item() == (12 if default else 3)


def test_a_condition_nobody_set_fails_the_launch(api):
    x, stream = integers(0), api.stream()
    graph = capture_if(api, stream, x, x, set_condition=False, flags=0)
    assert api.launch_graph(graph, stream) == "cudaErrorLaunchFailure"
    assert "never set" in api.runtime.failure


def capture_while(api, stream, counter, x, *, count=True):
    body_stream = api.stream()
    api.begin_capture(stream)
    graph = api.new("get_capture_graph", first=stream)
    handle = api.new("cudaGraphConditionalHandleCreate", graph, 1, ASSIGN_DEFAULT)
    body = ctypes.c_void_p()
    assert api.add_conditional(stream, handle, WHILE, ctypes.byref(body)) == OK
    assert api.cudaStreamBeginCaptureToGraph(body_stream, body, 0, 0, 0, GLOBAL) == OK
    api.launch_add(body_stream, x, 3)
    if count:
        api.launch_count_down(body_stream, handle, counter)
    api.end_capture(body_stream)
    return api.end_capture(stream)


def test_a_while_node_repeats_its_body(api):
    counter, x, stream = integers(5), integers(0), api.stream()
    assert api.launch_graph(capture_while(api, stream, counter, x), stream) == OK
    assert (counter.item(), x.item()) == (0, 15)


def test_an_endless_while_node_fails_the_launch(api):
    api.runtime.configure(while_limit=20)
    counter, x, stream = integers(5), integers(0), api.stream()
    graph = capture_while(api, stream, counter, x, count=False)
    assert api.launch_graph(graph, stream) == "cudaErrorLaunchFailure"
    assert (x.item(), "20 times" in api.runtime.failure) == (60, True)
    assert api.cudaStreamSynchronize(stream) == "cudaErrorLaunchFailure", "the error is sticky"
    assert api.launch_add(stream, x, 1) == "cudaErrorLaunchFailure"
    assert x.item() == 60


def test_racing_threads_may_not_set_a_condition(api):
    x, stream = integers(1), api.stream()
    api.begin_capture(stream)
    graph = api.new("get_capture_graph", first=stream)
    handle = api.new("cudaGraphConditionalHandleCreate", graph, 0, ASSIGN_DEFAULT)
    assert api.launch_set_condition(stream, handle, x, 2) == OK
    body = ctypes.c_void_p()
    assert api.add_conditional(stream, handle, IF, ctypes.byref(body)) == OK
    assert api.launch_graph(api.end_capture(stream), stream) == "cudaErrorLaunchFailure"
    assert "another thread of the kernel set too" in api.runtime.failure


def test_only_a_graph_that_runs_has_conditions(api):
    x, stream = integers(1), api.stream()
    assert api.launch_set_condition(stream, 12345, x, 1) == "cudaErrorLaunchFailure"
    assert "not one of the graph that runs" in api.runtime.failure


# What CUDA forbids


def test_a_handle_serves_one_node_of_its_own_graph(api):
    stream, other = api.stream(), api.stream()
    api.begin_capture(stream, RELAXED)
    api.begin_capture(other, RELAXED)
    graph = api.new("get_capture_graph", first=stream)
    handle = api.new("cudaGraphConditionalHandleCreate", graph, 0, ASSIGN_DEFAULT)
    body = ctypes.c_void_p()
    assert api.add_conditional(other, handle, IF, ctypes.byref(body)) == "cudaErrorInvalidValue"
    assert api.add_conditional(stream, handle, IF, ctypes.byref(body)) == OK
    assert api.add_conditional(stream, handle, IF, ctypes.byref(body)) == "cudaErrorInvalidValue"
    assert api.add_conditional(stream, handle + 1, IF, ctypes.byref(body)) == "cudaErrorInvalidValue"


def test_a_handle_without_a_node_keeps_a_graph_from_being_instantiated(api):
    graph, out = api.new("cudaGraphCreate", 0), ctypes.c_void_p()
    api.new("cudaGraphConditionalHandleCreate", graph, 0, ASSIGN_DEFAULT)
    assert api.cudaGraphInstantiate(ctypes.byref(out), graph, 0) == "cudaErrorInvalidValue"


def test_one_instance_at_a_time_of_a_graph_with_conditions(api):
    flag, x, stream, out = integers(0), integers(0), api.stream(), ctypes.c_void_p()
    graph = capture_if(api, stream, flag, x)
    first = api.new("cudaGraphInstantiate", graph, 0)
    assert api.cudaGraphInstantiate(ctypes.byref(out), graph, 0) == "cudaErrorNotSupported"
    assert api.cudaGraphExecDestroy(first) == OK
    assert api.cudaGraphInstantiate(ctypes.byref(out), graph, 0) == OK


def test_a_conditional_node_cannot_begin_while_a_kernel_runs(api):
    x, stream, body = integers(0), api.stream(), ctypes.c_void_p()
    api.begin_capture(stream)
    graph = api.new("get_capture_graph", first=stream)
    handle = api.new("cudaGraphConditionalHandleCreate", graph, 0, ASSIGN_DEFAULT)
    api.launch_add(stream, x, 1)
    assert api.make_dependency_programmatic(stream) == OK
    assert api.add_conditional(stream, handle, IF, ctypes.byref(body)) == "cudaErrorLossyQuery"
    assert api.add_conditional_with_edges(stream, handle) == "cudaErrorInvalidValue"


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def test_a_body_holds_no_host_function(api):
    stream, body_stream, out = api.stream(), api.stream(), ctypes.c_void_p()
    api.begin_capture(stream)
    graph = api.new("get_capture_graph", first=stream)
    handle = api.new("cudaGraphConditionalHandleCreate", graph, 0, ASSIGN_DEFAULT)
    body = ctypes.c_void_p()
    assert api.add_conditional(stream, handle, IF, ctypes.byref(body)) == OK
    assert api.cudaStreamBeginCaptureToGraph(body_stream, body, 0, 0, 0, GLOBAL) == OK
    assert api.cudaLaunchHostFunc(body_stream, HOST_FUNCTION(lambda _: None), 0) == OK
    api.end_capture(body_stream)
    assert api.cudaGraphInstantiate(ctypes.byref(out), api.end_capture(stream), 0) == "cudaErrorNotSupported"


def test_what_a_capture_cannot_see_invalidates_it(api):
    for call, *arguments in [
        ("cudaMalloc", ctypes.byref(ctypes.c_void_p()), 16),
        ("cudaStreamSynchronize",),
        ("cudaStreamQuery",),
        ("cudaDeviceSynchronize",),
        ("cudaMemcpy", integers(0), integers(1), 4, 3),
        ("cudaGraphLaunch", api.new("cudaGraphInstantiate", api.new("cudaGraphCreate", 0), 0)),
    ]:
        stream, graph = api.stream(), ctypes.c_void_p(1)
        api.begin_capture(stream)
        on_stream = [stream] if call in ("cudaStreamSynchronize", "cudaStreamQuery", "cudaGraphLaunch") else []
        assert getattr(api, call)(*arguments, *on_stream) == "cudaErrorStreamCaptureUnsupported", call
        status = ctypes.c_int()
        assert (api.cudaStreamIsCapturing(stream, ctypes.byref(status)), status.value) == (OK, 2)
        assert api.launch_add(stream, integers(0), 1) == "cudaErrorStreamCaptureInvalidated", call
        assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == "cudaErrorStreamCaptureInvalidated", call
        assert graph.value is None


def test_a_relaxed_capture_allows_allocations(api):
    stream = api.stream()
    api.begin_capture(stream, RELAXED)
    memory = api.new("cudaMalloc", 16)
    assert api.cudaFree(memory) == OK
    api.end_capture(stream)


def in_another_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_captures_belong_to_a_thread_unless_relaxed(api):
    stream, graph, out = api.stream(), ctypes.c_void_p(), ctypes.c_void_p()
    api.begin_capture(stream, THREAD_LOCAL)
    assert in_another_thread(api.cudaMalloc, ctypes.byref(out), 16) == OK
    assert (
        in_another_thread(api.cudaStreamEndCapture, stream, ctypes.byref(graph)) == "cudaErrorStreamCaptureWrongThread"
    )
    assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == OK
    api.begin_capture(stream, RELAXED)
    assert in_another_thread(api.cudaStreamEndCapture, stream, ctypes.byref(graph)) == OK
    api.begin_capture(stream, GLOBAL)
    assert in_another_thread(api.cudaMalloc, ctypes.byref(out), 16) == "cudaErrorStreamCaptureUnsupported"


def test_a_failed_launch_invalidates_the_capture(api):
    stream, graph = api.stream(), ctypes.c_void_p()
    api.begin_capture(stream)
    assert api.launch_link(stream, 0, integers(0), integers(0), 1, 2000) == "cudaErrorInvalidConfiguration"
    assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == "cudaErrorStreamCaptureInvalidated"


def test_only_the_stream_that_began_a_capture_ends_it(api):
    stream, other, event, graph = api.stream(), api.stream(), api.new("cudaEventCreateWithFlags", 2), ctypes.c_void_p()
    api.begin_capture(stream)
    api.cudaEventRecord(event, stream)
    api.cudaStreamWaitEvent(other, event, 0)
    assert api.cudaStreamEndCapture(other, ctypes.byref(graph)) == "cudaErrorStreamCaptureUnmatched"
    assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == "cudaErrorStreamCaptureInvalidated"
    assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == "cudaErrorIllegalState"


def test_forked_work_must_be_joined(api):
    stream, other, event, graph = api.stream(), api.stream(), api.new("cudaEventCreateWithFlags", 2), ctypes.c_void_p()
    api.begin_capture(stream)
    api.cudaEventRecord(event, stream)
    api.cudaStreamWaitEvent(other, event, 0)
    api.launch_add(other, integers(0), 1)
    assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == "cudaErrorStreamCaptureUnjoined"
    assert api.runtime.live == {"streams": 2, "events": 1}


def test_captures_do_not_mix(api):
    stream, other, outside, event = *(api.stream() for _ in range(3)), api.new("cudaEventCreateWithFlags", 2)
    assert api.cudaStreamBeginCapture(0, GLOBAL) == "cudaErrorStreamCaptureUnsupported"
    api.begin_capture(stream)
    assert api.cudaStreamBeginCapture(stream, GLOBAL) == "cudaErrorIllegalState"
    api.begin_capture(other)
    api.cudaEventRecord(event, other)
    assert api.cudaEventQuery(event) == "cudaErrorCapturedEvent"
    assert api.cudaStreamWaitEvent(stream, event, 0) == "cudaErrorStreamCaptureMerge"
    api.cudaEventRecord(event, outside)
    assert api.cudaStreamWaitEvent(other, event, 0) == "cudaErrorStreamCaptureIsolation"


def test_the_legacy_stream_may_not_wait_for_a_blocking_stream_that_captures(api):
    stream, graph = api.new("cudaStreamCreateWithFlags", 0), ctypes.c_void_p()
    api.begin_capture(stream)
    assert api.launch_add(0, integers(0), 1) == "cudaErrorStreamCaptureImplicit"
    assert api.cudaStreamEndCapture(stream, ctypes.byref(graph)) == "cudaErrorStreamCaptureInvalidated"


def test_destroyed_objects_are_not_used(api):
    stream, event, graph = api.stream(), api.new("cudaEventCreateWithFlags", 2), api.new("cudaGraphCreate", 0)
    exec_, out = api.new("cudaGraphInstantiate", graph, 0), ctypes.c_void_p()
    assert api.cudaGraphLaunch(exec_, stream) == OK
    for call, value in (
        ("cudaGraphExecDestroy", exec_),
        ("cudaGraphDestroy", graph),
        ("cudaEventDestroy", event),
        ("cudaStreamDestroy", stream),
    ):
        assert getattr(api, call)(value) == OK
        assert getattr(api, call)(value) != OK
    assert api.cudaGraphInstantiate(ctypes.byref(out), graph, 0) == "cudaErrorInvalidValue"
    for call, *arguments in (
        ("cudaGraphLaunch", exec_, 0),
        ("cudaEventRecord", event, 0),
        ("cudaStreamSynchronize", stream),
        ("launch_add", stream, integers(0), 1),
    ):
        assert getattr(api, call)(*arguments) == "cudaErrorInvalidResourceHandle"


# Kernels that overlap (programmatic dependent launch)


def chain(api, mistake, seed, captured=True, first=0):
    """Three kernels, each adding 1 to what the one before wrote, from x to y, to x, to y; the second may be wrong."""
    api.runtime.reset(seed=seed)
    x, y = torch.full((192,), 5, dtype=torch.int32), torch.full((192,), -100, dtype=torch.int32)
    stream = api.stream()
    if captured:
        api.begin_capture(stream)
    errors = [
        api.launch_link(stream, first, x, y, 3, 64),
        api.launch_link(stream, mistake, y, x, 3, 64),
        api.launch_link(stream, 0, x, y, 3, 64),
    ]
    if captured:
        errors.append(api.launch_graph(api.end_capture(stream), stream))
    return errors, y.unique().tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("captured", [True, False])
def test_overlapping_kernels_that_wait_are_right(api, seed, captured):
    for first in (0, 4):
        errors, result = chain(api, 0, seed, captured, first)
        assert (set(errors), result) == ({OK}, [8])


@pytest.mark.parametrize("captured", [True, False])
def test_every_thread_must_wait_for_the_kernel_before(api, captured):
    errors, _ = chain(api, 1, 0, captured)
    assert "cudaErrorLaunchFailure" in errors
    assert re.search(r"kernel link, block .*, thread .*: exits without griddepcontrol.wait", api.runtime.failure)


@pytest.mark.parametrize("first", [0, 4], ids=["all_trigger", "one_exits_without_trigger"])
@pytest.mark.parametrize("mistake", [2, 3], ids=["reads_before_wait", "writes_before_wait"])
def test_what_comes_before_the_wait_shows_as_a_wrong_result(api, mistake, first):
    right = [chain(api, mistake, seed, first=first)[1] == [8] for seed in SEEDS]
    assert right[:2] == [False, True], "dependents start as early as they may under seed 0, as late under seed 1"
    assert not all(right[2:])
