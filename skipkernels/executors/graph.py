"""GraphExecutor: the program as a CUDA graph, captured once; the skip decision never leaves the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from itertools import groupby

from skipkernels.errors import DeviceError
from skipkernels.executors.execution import Execution
from skipkernels.executors.formats import require_cache_dtype, require_formats, require_planes_fp32
from skipkernels.executors.runtime import CudaRuntime, Graph
from skipkernels.model.matrix import BLOCK_FORMATS, FLOAT_FORMATS
from skipkernels.program import Program
from skipkernels.program.state import DECODING, DecodeState

logger = logging.getLogger(__name__)

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
        require_formats(program, "graph", (*FLOAT_FORMATS, *BLOCK_FORMATS))
        require_planes_fp32(program, "graph")
        require_cache_dtype(program, "graph", state)
        self.program = program
        self.state = state
        self.execution = execution
        self._interrupted = False
        self._runtime = runtime or CudaRuntime(state.active.device)
        self.overlaps = execution.kernels == "cuda"  # kernels start before the one in front of them has ended
        self._runtime.refuse_while_capturing(self._runtime.stream())
        try:
            self._launcher = self._runtime.launcher(program, state, execution.kernels)
            self._warm_up()
            self._graph = None if execution.debug else self._capture()
        except (RuntimeError, ValueError) as error:
            raise DeviceError(str(error)) from error

    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active or ``interrupt`` was called. Returns each step's
        seconds."""
        try:
            return list(self.steps(max_steps))
        finally:
            self._interrupted = False

    def interrupt(self) -> None:
        """As in ``Executor``; a generation that is one launch (loop ``while``) cannot be interrupted."""
        self._interrupted = True

    def run_instruction(self, index: int) -> None:
        """Runs one instruction of the program, for tests that compare buffers after each."""
        stream = self._runtime.stream()
        try:
            self._launcher.launch(index, stream, False)
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
                self._launcher.launch(index, graph.stream, False)
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
                self._launcher.launch(index, stream, False)
            except RuntimeError as error:
                raise DeviceError(f"instruction {index} ({ins.op}): {error}") from error
        state.active.copy_(flags[0])
        state.run_ffn.copy_(flags[1])
        self._runtime.synchronize(stream)

    def _capture(self) -> Graph:
        """One step, or with loop ``while`` all of them, as a graph."""
        try:
            return self._captured()
        except self._runtime.instantiation_errors as error:
            if not self.overlaps:
                raise
            # NVIDIA says nowhere whether programmatic edges may stand in the bodies of conditional nodes
            logger.warning(
                "no graph with programmatic edges (%s): captured without, kernels do not overlap", str(error)
            )
        self.overlaps = False
        return self._captured()

    def _captured(self) -> Graph:
        state, graph = self.state, self._runtime.graph()
        with graph.capture():
            if self.execution.loop == "while":
                with graph.while_any(state.active):
                    self._capture_step(graph)
            else:
                self._capture_step(graph)
        return graph

    def _capture_step(self, graph: Graph) -> None:
        behind_kernel = False  # conditional nodes take and give full dependencies
        neighbours = groupby(range(len(self.program)), key=lambda index: self.program[index].row_mask.data_ptr())
        for flag, indices in neighbours:
            conditional = self.execution.conditional == "if_node" and flag != self.state.active.data_ptr()
            if not conditional:
                for index in indices:
                    launched = self._launcher.launch_in_step(index, graph.stream, self.overlaps and behind_kernel)
                    behind_kernel = behind_kernel or launched
                continue
            body = list(indices)
            with graph.if_any(self.program[body[0]].row_mask):
                for index in body:
                    self._launcher.launch_in_step(index, graph.stream, self.overlaps and index != body[0])
            behind_kernel = False

    def steps(self, max_steps: int) -> Generator[float]:
        """Runs up to ``max_steps`` steps, until no row is active, and yields each step's seconds; the device is up to
        AHEAD steps ahead. When the iterator is closed, the device has come to rest."""
        stream, progress = self._runtime.stream(), _Progress(self.state)
        self._runtime.refuse_while_capturing(stream)
        looped = self._graph is not None and self.execution.loop == "while"
        finished = self._looped if looped else self._replayed
        if not progress.goes_on(0):
            finished = self._prompt_rows
        try:
            try:
                started = time.perf_counter()
                for _ in finished(max_steps, stream, progress):
                    now = time.perf_counter()
                    yield now - started
                    started = now
            finally:  # whatever the end is, the device has come to rest
                self._interrupted = False
                self._runtime.synchronize(stream)
        except DeviceError:
            raise
        except RuntimeError as error:
            raise DeviceError(f"{error}; load the engine with debug to learn in which instruction") from error

    def _replayed(self, max_steps: int, stream: int, progress: _Progress) -> Iterator[None]:
        """A launch a step, AHEAD of them in flight; yields at the end of each step."""
        done = in_flight = 0
        while done < max_steps and progress.goes_on(done) and not (done and self._interrupted):
            while in_flight < min(AHEAD, max_steps - done):
                self._launch_step(stream)
                in_flight += 1
            if not self._wait(stream, progress, done + 1):
                return
            done, in_flight = done + 1, in_flight - 1
            yield

    def _looped(self, max_steps: int, stream: int, progress: _Progress) -> Iterator[None]:
        """One launch for all steps; yields at the end of each."""
        if max_steps < 1 or not progress.goes_on(0) or self._graph is None:
            return
        self._graph.set_steps(max_steps, stream)
        self._graph.launch(stream)
        done = 0
        while done < max_steps and progress.goes_on(done) and self._wait(stream, progress, done + 1):
            done += 1
            yield

    def _prompt_rows(self, max_steps: int, stream: int, progress: _Progress) -> Iterator[None]:
        """A step of prompt rows only, where there are any."""
        if max_steps and self.state.num_prompt_rows and bool(self.state.active.any()):
            if self._graph is not None and self.execution.loop == "while":
                self._graph.set_steps(1, stream)
            self._launch_step(stream)
            self._runtime.synchronize(stream)
            yield

    def _launch_step(self, stream: int) -> None:
        if self._graph is not None:
            self._graph.launch(stream)
            return
        for index in range(len(self.program)):
            self.run_instruction(index)

    def _wait(self, stream: int, progress: _Progress, tokens: int) -> bool:
        """Waits until a row has that many new tokens; False where the device came to rest without."""
        polls = 0
        while progress.tokens() < tokens:
            polls += 1
            time.sleep(0)  # other threads may have the interpreter
            if polls % _POLLS_BEFORE_QUERY == 0 and not self._runtime.busy(stream):
                return progress.tokens() >= tokens
        return True


class _Progress:
    """What a run has made so far. The device writes it into the host's memory while it runs on."""

    def __init__(self, state: DecodeState) -> None:
        self._progress = state.progress
        self._before = state.progress[:, 0].clone()

    def tokens(self) -> int:
        """New tokens of the row that has most."""
        return int((self._progress[:, 0] - self._before).max())

    def goes_on(self, done: int) -> bool:
        """Whether a row is active, or the device is ahead of ``done`` steps."""
        return bool((self._progress[:, 1] == DECODING).any()) or self.tokens() > done
