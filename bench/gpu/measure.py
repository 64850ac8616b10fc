"""One part of gpu_suite.sh: ``measure.py PART --rows FILE``. Each row is in the file as soon as it is measured."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.peers import measure_peer, measure_peers
from bench.gpu.rows import Rows
from bench.gpu.setting import Setting
from skipkernels.benchmark.decode import run_decode_bench
from skipkernels.benchmark.kernels import keep_neurons, run_kernel_bench
from skipkernels.benchmark.systems import SkipkernelsSystem, policies_for
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.kernel_options import SWITCHES, KernelOptions
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, TimingPolicy
from skipkernels.support.report import environment, with_peak_floor

SKIPPING = TimingPolicy(0.25)


def versions(setting: Setting, rows: Rows) -> None:
    facts = environment(setting.execution())
    packages = ("torch", "transformers", "triton", "pybind11", "setuptools", "pytest", "numpy")
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    facts["packages"] = {name: installed.get(name) for name in packages}
    rows.write({"environment": facts})
    print(facts)
    if int(str(facts["packages"]["setuptools"] or "0").split(".")[0]) < 77:
        print("setuptools is older than 77: the build may refuse pyproject.toml's license")


def tokens(setting: Setting, rows: Rows) -> None:
    """The modes of the graph executor decode the same tokens."""
    modes = [(conditional, loop) for conditional in ("predicate", "if_node") for loop in ("replay", "while")]
    (name,) = setting.names("llama-3.2-1b")
    expected: list[int] | None = None
    wrong = 0
    for conditional, loop in modes[:1] if setting.dry else modes:
        engine = setting.engine(name, 96, execution=setting.execution(conditional, loop))
        answer = engine.generate([list(range(1, 33))], max_new_tokens=32, policy=SKIPPING)[0]
        expected = expected or answer.token_ids
        same = answer.token_ids == expected and len(answer.token_ids) == 32
        wrong += not same
        rows.write({"shapes": name, "conditional": conditional, "loop": loop, "same_tokens": same})
        del engine
    sys.exit(wrong)


def decode(setting: Setting, rows: Rows) -> None:
    """Whole steps, ours alone."""
    facts = environment(setting.execution())
    cases = [("llama-3.2-1b", 1, 128), ("llama-2-7b", 1, 128), ("llama-3-8b", 1, 128)]
    cases += [("llama-3.2-1b", 4, 128), ("llama-3.2-1b", 1, 2048), ("llama-3.2-1b", 1, 8192)]
    for name, batch_size, prompt_tokens in [("tiny", 2, 4)] if setting.dry else cases:
        new_tokens = 4 if setting.dry else 48
        length = prompt_tokens + new_tokens
        engine = setting.engine(name, length).with_rows(batch_size)
        prompt = list(range(1, length))
        systems = [SkipkernelsSystem(engine, policy, batch_size, prompt) for policy in policies_for([0.25], None, True)]
        measured = run_decode_bench(
            list(systems),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=1 if setting.dry else 3,
            num_threads=1,
            device=engine.state.active.device,
        )
        for row in measured:
            rows.write(with_peak_floor({"shapes": name, "prompt_tokens": prompt_tokens, **facts, **row}))
        del engine, systems


def kernels(setting: Setting, rows: Rows) -> None:
    facts = environment(setting.execution())
    kv_len = 16 if setting.dry else 2048
    for name in setting.names("llama-3.2-1b", "llama-2-7b"):
        engine = setting.engine(name, kv_len + 12, layers=2 if setting.dry else 8)
        measured = run_kernel_bench(engine, kv_len=kv_len, rounds=1 if setting.dry else 3, num_threads=1)
        for row in measured:
            rows.write({"shapes": name, "batch_size": 1, "kv_len": kv_len, **facts, **row})
        del engine


def blocks(setting: Setting, rows: Rows) -> None:
    """Matrices of blocks: every op, and whole steps, beside the same shapes in bf16 of the parts before."""
    facts = environment(setting.execution())
    kv_len, new_tokens, rounds, layers = (16, 4, 1, 2) if setting.dry else (128, 48, 3, 8)
    for name in setting.names("llama-3.2-1b", "llama-3-8b"):
        for format in ("q8_0", "q4_0", "q4_k"):
            for batch_size in (1, 4):
                engine = setting.engine(name, kv_len + new_tokens, layers=layers, format=format).with_rows(batch_size)
                case = {"shapes": name, "format": format, "layers": layers, **facts}
                for row in run_kernel_bench(engine, kv_len=kv_len, rounds=rounds, num_threads=1):
                    rows.write({"batch_size": batch_size, "kv_len": kv_len, **case, **row})
                prompt = list(range(1, kv_len + new_tokens))
                systems = [
                    SkipkernelsSystem(engine, policy, batch_size, prompt) for policy in policies_for([0.25], None, True)
                ]
                measured = run_decode_bench(
                    list(systems),
                    prompt_tokens=kv_len,
                    new_tokens=new_tokens,
                    rounds=rounds,
                    num_threads=1,
                    device=engine.state.active.device,
                )
                for row in measured:
                    rows.write(with_peak_floor({"prompt_tokens": kv_len, **case, **row}))
                del engine, systems


def neurons(setting: Setting, rows: Rows) -> None:
    """The ops of neurons at several lengths of their list, and whole steps beside dense ones of the same weights."""
    facts = environment(setting.execution())
    kv_len, steps, rounds, layers = (16, 2, 1, 2) if setting.dry else (128, 32, 5, 8)
    for name in setting.names("llama-3.2-1b", "llama-3-8b"):
        engine = setting.engine(name, kv_len + steps + 12, layers=layers, neuron_rows=True)
        for kept in (1.0, 0.5, 0.25):
            measured = run_kernel_bench(engine, kv_len=kv_len, rounds=1 if setting.dry else 3, num_threads=1, kept=kept)
            for row in measured:
                rows.write({"shapes": name, "batch_size": 1, "kv_len": kv_len, "neurons_kept": kept, **facts, **row})
        state, policy = setting.state(engine), NeuronPolicy(gate_thresholds=(0.0,) * layers, warmup_tokens=0)
        dense, leaves_out = (setting.executor(engine, state, each, KernelOptions()) for each in (DensePolicy(), policy))
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for share in (None, 1.0, 0.625, 0.4):  # the last leave out 25 and 40 % of the FFN's bytes
                setting.place(engine, state, policy, kv_len)
                if share is not None:
                    keep_neurons(leaves_out, state, share)
                executor, label = (dense, "dense") if share is None else (leaves_out, f"{share:.1%} of the neurons")
                seconds.setdefault(label, []).append(sum(executor.run(steps)) / steps)
        for label, values in seconds.items():
            figures = {"us_per_step": statistics.median(values) * 1e6, "us_least": min(values) * 1e6}
            rows.write({"shapes": name, "layers": layers, "policy": policy.label, "variant": label, **figures})
        del engine, dense, leaves_out


def timeline(setting: Setting, rows: Rows) -> None:
    """When the kernels of a step began, had waited for the one before, and ended: overlap included."""
    for name in setting.names("llama-3.2-1b", "llama-2-7b"):
        engine = setting.engine(name, 160)
        state = setting.state(engine)
        for policy in (DensePolicy(), SKIPPING):
            instructions = len(setting.program(engine, state, policy))
            stamps = torch.zeros(instructions, 3, dtype=torch.int64, device=state.active.device)
            executor = setting.executor(engine, state, policy, KernelOptions(), stamps)
            place = partial(setting.place, engine, state, policy)
            steps = [_stamped_step(place, executor, stamps) for _ in range(2 if setting.dry else 12)]
            ops = [ins.op for ins in executor.program]
            for row in _spans(ops, torch.stack(steps[1:])):
                rows.write({"shapes": name, "policy": policy.label, **row})
        del engine


def _stamped_step(place: Callable[[int], None], executor: GraphExecutor, stamps: torch.Tensor) -> torch.Tensor:
    place(96)
    executor.run(2)  # the first token skips nothing
    stamps[:, :2], stamps[:, 2] = -1, 0  # as unsigned numbers, the largest
    executor.run(1)
    return stamps.cpu().clone()


def _spans(ops: list[str], steps: torch.Tensor) -> list[dict[str, Any]]:
    """Microseconds of each op, the median over layers and steps."""
    spans: dict[str, dict[str, list[float]]] = {}
    for step in steps.tolist():
        before = None
        for op, (began, waited, ended) in zip(ops, step, strict=True):
            if ended == 0:  # taken along by the next kernel
                continue
            if before is not None:
                figures = {"us_from_begin": ended - began, "us_after_previous_end": ended - before}
                if waited >= 0:
                    figures["us_wait_after_previous_end"] = waited - before
                else:  # without a row a matrix kernel takes no stamp behind its wait
                    op += ", skipped"
                for name, nanoseconds in figures.items():
                    spans.setdefault(op, {}).setdefault(name, []).append(nanoseconds / 1e3)
            before = ended
    return [
        {"op": op, **{name: statistics.median(values) for name, values in figures.items()}}
        for op, figures in spans.items()
    ]


def switches(setting: Setting, rows: Rows) -> None:
    """Microseconds of a step with all options on, with each of them off, and with other bounds of the prefetch."""
    variants = {"all on": KernelOptions(), "all off": KernelOptions(**dict.fromkeys(SWITCHES, False))}
    variants |= {f"without {name}": replace(KernelOptions(), **{name: False}) for name in SWITCHES}
    variants |= {f"prefetch {size} MB": KernelOptions(max_prefetch_bytes=size << 20) for size in (0, 4, 8, 24)}
    rounds, steps, layers = (1, 3, 4) if setting.dry else (5, 32, 16)
    for name in setting.names("llama-3.2-1b", "llama-2-7b"):
        engine = setting.engine(name, 128 + steps + 4, layers=layers)
        state = setting.state(engine)
        for policy in (DensePolicy(), SKIPPING):
            executors = {label: setting.executor(engine, state, policy, options) for label, options in variants.items()}
            seconds: dict[str, list[float]] = {label: [] for label in variants}
            for _ in range(rounds):
                for label, executor in executors.items():
                    setting.place(engine, state, policy, 128)
                    executor.run(1)  # the first token skips nothing
                    seconds[label].append(sum(executor.run(steps)) / steps)
            for label, values in seconds.items():
                figures = {"us_per_step": statistics.median(values) * 1e6, "us_least": min(values) * 1e6}
                rows.write({"shapes": name, "layers": layers, "policy": policy.label, "variant": label, **figures})
        del engine


PARTS: dict[str, Callable[[Setting, Rows], None]] = {
    part.__name__: part for part in (versions, tokens, decode, kernels, blocks, neurons, timeline, switches)
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[*PARTS, "peers", "peer"])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--peers", default="")
    given = parser.parse_args()
    torch.set_num_threads(1 if given.dry_run else max(1, (os.cpu_count() or 1) // 2))
    rows = Rows(given.rows, part=given.part)
    if given.part == "peers":
        limit = float(os.environ["LIMIT"])
        measure_peers(given.peers.split(","), Path(__file__), given.rows, limit, given.dry_run)
        return
    setting = Setting.of(given.dry_run)
    if given.part == "peer":
        measure_peer(given.peers, setting, Rows(given.rows, part="peers"))
    else:
        PARTS[given.part](setting, rows)


if __name__ == "__main__":
    main()
