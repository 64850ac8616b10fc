"""GraphExecutor: the program as a CUDA graph, captured once; the skip decision never leaves the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch

from skipkernels.errors import DeviceError
from skipkernels.executors.execution import Execution
from skipkernels.executors.runtime import CudaRuntime, Graph
from skipkernels.program import Program
from skipkernels.program.state import DecodeState

AHEAD = 4
"""Steps enqueued beyond the one the host waits for: enough to hide its wake-up, few enough to waste when rows end."""
_POLLS_BEFORE_QUERY = 1000


class GraphExecutor:
    """Executes a program over buffers on a GPU with the kernels, conditional and loop of ``execution``.

    A graph is launched on torch's current stream, so it takes its place among the user's own work there. Tokens reach
    the host through pinned memory (``DecodeState.progress``): nothing is copied and nobody waits for the stream.
    """

    name = "graph"

    def __init__(
        self, program: Program, state: DecodeState, execution: Execution, runtime: CudaRuntime | None = None
    ) -> None:
        """``execution`` must be resolved.

        Raises:
            DeviceError: the kernels cannot run this program, or its capture failed; nothing is left behind.
        """
        self.program = program
        self.state = state
        self.execution = execution
        self._runtime = runtime or CudaRuntime(state.active.device)
        self._runtime.refuse_while_capturing()
        try:
            self._launcher = self._runtime.launcher(program, state, execution.kernels)
            self._warm_up()
            self._graph = None if execution.debug else self._capture()
        except (RuntimeError, ValueError) as error:
            raise DeviceError(str(error)) from error

    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active. Returns each step's seconds."""
        return list(self._steps(max_steps))

    def steps(self) -> Iterator[float]:
        """Runs until no row is active and yields each step's seconds; the device is up to AHEAD steps ahead. When the
        iterator is closed, the device has come to rest."""
        return self._steps(self.state.max_seq_len)

    def run_instruction(self, index: int) -> None:
        """Runs one instruction of the program, for tests that compare buffers after each."""
        stream = self._runtime.stream()
        try:
            self._launcher(index, stream, False)
            self._runtime.synchronize(stream)
        except RuntimeError as error:
            raise DeviceError(f"instruction {index} ({self.program[index].op}): {error}") from error

    def profile(self, steps: int) -> list[tuple[str, float]]:
        """(op, seconds in ``steps`` steps) of every instruction over the rows as they stand.

        The instructions of an op are timed as a graph of their own, so each reads its weights cold, as in a step, and
        none overlaps its neighbours: a step takes less than the sum. All buffers but the cache keep their values.
        """
        kept = {name: buffer.clone() for name, buffer in self.state.buffers() if not name.endswith("_cache")}
        seconds: dict[str, float] = {}
        for op in dict.fromkeys(ins.op for ins in self.program):
            indices = [index for index, ins in enumerate(self.program) if ins.op == op]
            seconds[op] = self._time(indices, steps) / len(indices)
            for name, buffer in kept.items():
                getattr(self.state, name).copy_(buffer)
        return [(ins.op, seconds[ins.op]) for ins in self.program]

    def _time(self, indices: list[int], launches: int) -> float:
        """Seconds of ``launches`` launches of a graph of these instructions."""
        graph, stream = self._runtime.graph(), self._runtime.stream()
        with graph.capture():
            for index in indices:
                self._launcher(index, graph.stream, False)
        graph.launch(stream)
        self._runtime.synchronize(stream)
        started = time.perf_counter()
        for _ in range(launches):
            graph.launch(stream)
        self._runtime.synchronize(stream)
        return time.perf_counter() - started

    def _warm_up(self) -> None:
        """Launches every instruction with no row to act on: kernels are compiled and loaded before a capture, where
        neither is allowed."""
        state, stream = self.state, self._runtime.stream()
        flags = state.active.clone(), state.run_ffn.clone()
        state.active.zero_()
        state.run_ffn.zero_()
        for index, ins in enumerate(self.program):
            try:
                self._launcher(index, stream, False)
            except RuntimeError as error:
                raise DeviceError(f"instruction {index} ({ins.op}): {error}") from error
        state.active.copy_(flags[0])
        state.run_ffn.copy_(flags[1])
        self._runtime.synchronize(stream)

    def _capture(self) -> Graph:
        """One step, or with loop ``while`` all of them, as a graph."""
        state, graph = self.state, self._runtime.graph()
        with graph.capture():
            if self.execution.loop == "while":
                with graph.while_any(state.active):
                    self._capture_step(graph)
            else:
                self._capture_step(graph)
        return graph

    def _capture_step(self, graph: Graph) -> None:
        programmatic = False  # only behind a kernel: conditional nodes take and give full dependencies
        neighbours = groupby(range(len(self.program)), key=lambda index: self.program[index].when.data_ptr())
        for flag, indices in neighbours:
            conditional = self.execution.conditional == "if_node" and flag != self.state.active.data_ptr()
            if not conditional:
                for index in indices:
                    self._launcher(index, graph.stream, programmatic)
                    programmatic = True
                continue
            body = list(indices)
            with graph.if_any(self.program[body[0]].when):
                for index in body:
                    self._launcher(index, graph.stream, index != body[0])
            programmatic = False

    def _steps(self, max_steps: int) -> Iterator[float]:
        started = time.perf_counter()
        for _ in self._finished_steps(max_steps):
            now = time.perf_counter()
            yield now - started
            started = now

    def _finished_steps(self, max_steps: int) -> Iterator[None]:
        progress, stream = self.state.progress, self._runtime.stream()
        before = progress[:, 0].clone()
        if max_steps < 1 or not progress[:, 1].any():
            return
        launches = self._launches(max_steps, stream)
        launched = done = 0
        with self._come_to_rest(stream):
            while done < max_steps:
                # a while graph is launched once and makes all its steps
                while launched < done + AHEAD and next(launches, False):
                    launched += 1
                if not self._wait(stream, before, done):
                    return
                done += 1
                yield
                if not progress[:, 1].any() and int((progress[:, 0] - before).max()) == done:
                    return

    @contextmanager
    def _come_to_rest(self, stream: int) -> Iterator[None]:
        """Waits for the stream in the end, whatever the end is, and turns the device's errors into ours."""
        try:
            try:
                yield
            finally:
                self._runtime.synchronize(stream)
        except DeviceError:
            raise
        except RuntimeError as error:
            raise DeviceError(f"{error}; load the engine with debug to learn in which instruction") from error

    def _launches(self, max_steps: int, stream: int) -> Iterator[bool]:
        """Enqueues one more launch each time it is asked, as many as ``max_steps`` take."""
        if self._graph is None:
            for _ in range(max_steps):
                for index in range(len(self.program)):
                    self.run_instruction(index)
                yield True
        elif self.execution.loop == "while":
            self._graph.set_steps(max_steps, stream)
            self._graph.launch(stream)
            yield True
        else:
            for _ in range(max_steps):
                self._graph.launch(stream)
                yield True

    def _wait(self, stream: int, before: torch.Tensor, done: int) -> bool:
        """Waits until a row has more than ``done`` new tokens; False where the device came to rest without one."""
        polls = 0
        while int((self.state.progress[:, 0] - before).max()) <= done:
            polls += 1
            time.sleep(0)  # other threads may have the interpreter
            if polls % _POLLS_BEFORE_QUERY == 0 and not self._runtime.busy(stream):
                return int((self.state.progress[:, 0] - before).max()) > done
        return True
