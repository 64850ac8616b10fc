"""Peers, each in a process of its own: one that fails or hangs is a row, and costs the others nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.rows import Rows
from bench.gpu.setting import Setting
from skipkernels.benchmark.decode import run_decode_bench
from skipkernels.benchmark.shapes import shape_config
from skipkernels.benchmark.systems import Measurement, SkipkernelsSystem, System, TransformersSystem, module_over
from skipkernels.skipping.policy import DensePolicy
from skipkernels.support.report import environment, with_peak_floor

TAIL_SECONDS = 2.0
"""What is left of the part's time when the last peer is stopped, to write its row."""


def measure_peers(names: list[str], program: Path, rows: Path, seconds: float, dry: bool) -> None:
    """Each of ``names`` in turn, with an equal share of the time that is left."""
    ends = time.monotonic() + seconds - TAIL_SECONDS
    for number, name in enumerate(names):
        share = (ends - time.monotonic()) / (len(names) - number)
        command = [sys.executable, str(program), "peer", "--peers", name, "--rows", str(rows)]
        child = subprocess.Popen(
            command + ["--dry-run"] * dry, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            output, _ = child.communicate(timeout=max(1.0, share))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # compilers it started as well
            output, _ = child.communicate()
            Rows(rows, part="peers").write({"peer": name, "error": f"not done after {share:.0f} s"})
        text = output.decode(errors="replace")
        print(text)
        if child.returncode > 0:
            last = (text.strip().splitlines() or ["no output"])[-1]
            Rows(rows, part="peers").write({"peer": name, "error": last[:300]})


def measure_peer(name: str, setting: Setting, rows: Rows) -> None:
    """``name`` and our dense step, in turns."""
    prompt_tokens, new_tokens = (4, 4) if setting.dry else (128, 48)
    length = prompt_tokens + new_tokens
    (shapes,) = setting.names("llama-3.2-1b")
    engine = setting.engine(shapes, length)
    prompt = list(range(1, length))
    module = module_over(engine.weights, engine.config, shape_config(shapes, length))
    systems: list[System] = [SkipkernelsSystem(engine, DensePolicy(), 1, prompt)]
    systems.append(_kinds()[name](module, engine.config, 1, prompt))
    measured = run_decode_bench(
        systems,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=1 if setting.dry else 3,
        num_threads=1,
        device=engine.state.active.device,
    )
    facts = environment(setting.execution())
    for row in measured:
        rows.write(with_peak_floor({"shapes": shapes, "peer": name, "prompt_tokens": prompt_tokens, **facts, **row}))


def _kinds() -> dict[str, Any]:
    from skipkernels.benchmark.gpu_peers import CompiledSystem, TorchGraphSystem

    return {
        "transformers": TransformersSystem,
        "compiled": CompiledSystem,
        "cuda-graph": TorchGraphSystem,
        "failing": _Failing,
        "hanging": _Hanging,
    }


class _Failing(TransformersSystem):
    """For dry runs."""

    name = "failing"

    def decode(self, prompt_tokens: int, new_tokens: int) -> Measurement:
        raise RuntimeError("this peer fails")


class _Hanging(TransformersSystem):
    """For dry runs."""

    name = "hanging"

    def decode(self, prompt_tokens: int, new_tokens: int) -> Measurement:
        time.sleep(3600)
        raise AssertionError
