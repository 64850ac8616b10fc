"""The kernel bench: every op at a model's shapes by the executor's own clock, beside torch on the same matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from skipkernels.benchmark.bandwidth import bandwidth_gb_per_s
from skipkernels.benchmark.statistics import quantile
from skipkernels.benchmark.torch_ops import bytes_of, torch_counterpart
from skipkernels.program.table import Instruction
from skipkernels.skipping.policy import GatePlan, NeuronPolicy, Policy, TimingPolicy

if TYPE_CHECKING:
    from skipkernels.decoding.own_rows import OwnRows
    from skipkernels.engine import Engine
    from skipkernels.executors import ProfilingExecutor
    from skipkernels.program.state import DecodeState

STEPS = 8
"""Steps of one turn."""


def run_kernel_bench(
    engine: Engine,
    *,
    kv_len: int,
    rounds: int,
    num_threads: int,
    kept: float | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Times every op of a program that tests and never skips, with all rows of ``engine`` at ``kv_len`` positions; or,
    with ``kept``, of one that leaves out all but this share of each layer's neurons (of all rows together; the weights
    must lie for it).

    In each round ours and torch's take turns between two readings of the bandwidth; an op reads the matrices of one
    layer after the other, so that they come from memory where the model is larger than the caches. A row per op:
    microseconds per instruction (median, p20, p80), bytes, GB/s, share of the bandwidth, torch's microseconds.
    """
    layers = engine.config.num_hidden_layers
    policy: Policy = TimingPolicy(0.0)
    if kept is not None:
        policy = NeuronPolicy(gate_thresholds=(0.0,) * layers, warmup_tokens=0)
    executor: Any = engine.executor_for(policy)
    ops = list(dict.fromkeys(ins.op for ins in executor.program))
    ours: dict[str, list[float]] = {op: [] for op in ops}
    theirs: dict[str, list[float]] = {op: [] for op in ops}
    shares: dict[str, list[float]] = {op: [] for op in ops}
    bytes_per_op: dict[str, int] = {}
    device = engine.state.active.device
    instructions = {op: [ins for ins in executor.program if ins.op == op] for op in ops}
    with engine.loop.own_rows() as own:
        for number in range(rounds + 1):  # the first is the warm-up
            _place_rows(own, kv_len, policy.plan(layers))
            if kept is not None:
                keep_neurons(executor, engine.state, kept)
            bytes_per_op = {op: bytes_of(listed[0]) for op, listed in instructions.items()}
            before = bandwidth_gb_per_s(device, num_threads)
            spent = _seconds_per_instruction(executor)
            after = bandwidth_gb_per_s(device, num_threads)
            for op in ops:
                seconds = _torch_seconds(instructions[op], device)
                if number == 0:
                    continue
                ours[op].append(spent[op])
                shares[op].append(bytes_per_op[op] / spent[op] / 1e9 / ((before + after) / 2))
                if seconds is not None:
                    theirs[op].append(seconds)
            on_turn()
    return [_row(op, ours[op], theirs[op], shares[op], bytes_per_op[op]) for op in ops]


def keep_neurons(executor: Any, state: DecodeState, kept: float, products_kept: float = 1.0) -> None:
    """Runs a step, and sets each layer's thresholds to quantiles of what it brings, over all decode rows: of the gates
    ``kept`` stay, and ``products_kept`` of the products (those of left out gates, which are 0, among them)."""
    for index, ins in enumerate(executor.program):
        if ins.op == "experts_gate_up_act":
            _settle_gates(executor, index, state, kept)
        elif ins.op == "select_neurons" and ins.tensors["neuron_thresholds"] is not state.no_thresholds:
            share = products_kept if ins.scalars["stage"] else kept
            values = ins.tensors["intermediate"][: state.num_sequences].abs()
            # as many as one row has: torch takes no quantile of more than 16 million
            threshold = values.flatten()[:: len(values)].quantile(1 - share) if share < 1 else 0.0
            ins.tensors["neuron_thresholds"][:, int(ins.scalars["layer"])] = threshold
        executor.run_instruction(index)


def _settle_gates(executor: Any, index: int, state: DecodeState, kept: float) -> None:
    """The same for gates of experts, which only their products show: by bisection."""
    ins, (low, high) = executor.program[index], (0.0, 64.0)
    while kept < 1 and high - low > 1e-4 * high:
        ins.tensors["gate_thresholds"][:, int(ins.scalars["layer"])] = (low + high) / 2
        executor.run_instruction(index)
        share = float((ins.tensors["expert_intermediate"][: state.num_sequences] != 0).float().mean())
        low, high = ((low + high) / 2, high) if share > kept else (low, (low + high) / 2)


def _place_rows(own: OwnRows, kv_len: int, plan: GatePlan | None) -> None:
    """Every decode row at ``kv_len`` cached positions; what they hold does not change the time."""
    for slot in range(own.state.num_sequences):
        own.place(slot, kv_len, plan)
    own.start()


def _seconds_per_instruction(executor: ProfilingExecutor) -> dict[str, float]:
    spent: dict[str, list[float]] = {}
    for op, seconds in executor.profile(STEPS):
        spent.setdefault(op, []).append(seconds / STEPS)
    return {op: statistics.mean(values) for op, values in spent.items()}


def _torch_seconds(instructions: list[Instruction], device: torch.device) -> float | None:
    """Seconds of torch's own op, one layer after the other; as a CUDA graph on a GPU, as ours are."""
    calls = [torch_counterpart(ins) for ins in instructions]
    listed = [call for call in calls if call is not None]
    if not listed:
        return None

    def once() -> None:
        for call in listed:
            call()

    with torch.inference_mode():
        once()
        replay: Callable[[], None] = once
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                once()
            replay = graph.replay
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(STEPS):
            replay()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / STEPS / len(listed)


def _row(op: str, ours: list[float], theirs: list[float], shares: list[float], size: int) -> dict[str, Any]:
    median = statistics.median(ours)
    ratios = [other / own for own, other in zip(ours, theirs, strict=False)]
    return {
        "op": op,
        "us": median * 1e6,
        "us_p20": quantile(ours, 0.2) * 1e6,
        "us_p80": quantile(ours, 0.8) * 1e6,
        "bytes": size,
        "gb_per_s": size / median / 1e9,
        "bandwidth_fraction": statistics.median(shares),
        "torch_us": statistics.median(theirs) * 1e6 if theirs else None,
        "speedup_vs_torch": statistics.median(ratios) if ratios else None,
    }
