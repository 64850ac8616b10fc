"""How far ahead weights should be brought into the second-level cache: decode steps over the bytes prefetched."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from skipkernels.cli.bench.kernels import random_engine
from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.native import native_program
from skipkernels.executors.runtime import CudaRuntime, Launcher
from skipkernels.program import Program, build_program
from skipkernels.program.state import DecodeState
from skipkernels.skipping.policy import Policy, TimingPolicy
from skipkernels.support.report import environment

MEGABYTES = (0, 4, 8, 16, 24, 32)
ROUNDS, STEPS, LAYERS = 7, 32, 16


class PrefetchingRuntime(CudaRuntime):
    """The usual runtime with a bound of its own on what attention prefetches."""

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        super().__init__(device)
        self._max_bytes = max_bytes

    def launcher(self, program: Program, state: DecodeState, kernels: str) -> Launcher:
        instructions = native_program(program, state, self.native)
        return self.native.CudaLauncher(instructions, 0, self._max_bytes).launch


def main(out: Path, shapes: Sequence[str] = ("llama-3.2-1b", "llama-2-7b")) -> None:
    execution = Execution(device="cuda", kernels="cuda").resolved()
    rows = []
    for name in shapes:
        engine = random_engine(name, "bf16", LAYERS, 1, 128 + ROUNDS * STEPS, execution)
        for policy in (TimingPolicy(0.0), TimingPolicy(0.25)):
            program = build_program(engine.config, engine.weights, engine.state, policy)
            executors = {
                size: GraphExecutor(
                    program, engine.state, execution, PrefetchingRuntime(torch.device("cuda", 0), size << 20)
                )
                for size in MEGABYTES
            }
            rows += [{"shapes": name, "policy": policy.label, **row} for row in _sweep(engine.state, executors, policy)]
    out.write_text(json.dumps({"environment": environment(execution), "layers": LAYERS, "rows": rows}, indent=2) + "\n")


def _sweep(state: DecodeState, executors: dict[int, GraphExecutor], policy: Policy) -> list[dict[str, float]]:
    """Microseconds of a step, the sizes in turns."""
    seconds: dict[int, list[float]] = {size: [] for size in executors}
    for _ in range(ROUNDS):
        for size, executor in executors.items():
            state.max_new_tokens.fill_(STEPS + 1)
            state.begin_row(0, torch.zeros(128, dtype=torch.int32))
            executor.run(1)  # the first token skips nothing
            seconds[size].append(sum(executor.run(STEPS)) / STEPS)
    return [
        {"prefetch_mb": size, "us_per_step": statistics.median(values) * 1e6, "us_least": min(values) * 1e6}
        for size, values in seconds.items()
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
