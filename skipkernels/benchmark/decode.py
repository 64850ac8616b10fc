"""The decode bench: systems in turns in one process, each turn between two readings of the memory's bandwidth."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from skipkernels.benchmark.bandwidth import bandwidth_gb_per_s
from skipkernels.benchmark.statistics import quantile
from skipkernels.benchmark.systems import Measurement, System


@dataclass
class _Turns:
    """What one system did over all rounds."""

    measurements: list[Measurement] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)  # GB/s around each turn

    def step_seconds(self, turn: int) -> float:
        return statistics.median(self.measurements[turn].seconds)


def run_decode_bench(
    systems: list[System],
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    num_threads: int,
    device: torch.device | None = None,
    on_turn: Callable[[], None] = lambda: None,
    on_round: Callable[[list[dict[str, object]]], object] = lambda rows: None,
) -> list[dict[str, object]]:
    """Decodes ``new_tokens`` with every system in every round, in an order that rotates; returns a row per system.

    Ratios (``bandwidth_fraction``, ``speedup_vs_dense``) are taken within a round and then their median, so a machine
    whose speed drifts from minute to minute does not bend them. The baseline of a batch size is its first system.
    A step decodes one token of every row: ``ms_per_token`` is the time between two tokens of a row, ``bytes_per_token``
    what is read in that time, ``tokens_per_s`` counts all rows, and so does ``prompt_tokens_per_s``: prompt tokens over
    the time to the last first token; ``floor_ms`` is what the bytes take at the bandwidth probed. ``on_round`` is
    called with the rows as they stand after each round.

    A system of others (one without a policy) that fails is left out from then on; its row holds the ``error`` alone.
    """
    turns: dict[int, _Turns] = defaultdict(_Turns)
    failures: dict[int, str] = {}
    device = device or torch.device("cpu")

    def decode(index: int, tokens: int) -> Measurement | None:
        try:
            return systems[index].decode(prompt_tokens, tokens)
        except Exception as error:
            if systems[index].policy is not None:
                raise
            failures[index] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def rows_after(rounds: int) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for index, system in enumerate(systems):
            baseline = turns[first_of_batch[system.batch_size]]
            failed = {"error": failures[index]} if index in failures else None
            rows.append(_identity(system) | (failed or _figures(system, turns[index], baseline, rounds, prompt_tokens)))
        return rows

    first_of_batch = {system.batch_size: index for index, system in reversed(list(enumerate(systems)))}
    for index in range(len(systems)):  # warm-up: touches every page, records every program
        decode(index, min(new_tokens, 4))
    before = bandwidth_gb_per_s(device, num_threads)
    for number in range(rounds):
        for offset in range(len(systems)):
            index = (number + offset) % len(systems)
            measurement = None if index in failures else decode(index, new_tokens)
            after = bandwidth_gb_per_s(device, num_threads)
            if measurement is not None:
                turns[index].measurements.append(measurement)
                turns[index].bandwidths.append((before + after) / 2)
            before = after
            on_turn()
        on_round(rows_after(number + 1))
    rows = rows_after(rounds)
    for index, system in enumerate(systems):
        spent = {} if index in failures else system.instruction_ms(prompt_tokens, new_tokens)
        rows[index]["instruction_ms"] = spent
        rows[index]["skip_gate_fraction"] = spent.get("skip_gate", 0.0) / sum(spent.values()) if spent else 0.0
    return rows


def _identity(system: System) -> dict[str, object]:
    return {
        "system": system.name,
        "policy": system.policy.label if system.policy else "dense",
        "batch_size": system.batch_size,
    }


def _figures(system: System, own: _Turns, baseline: _Turns, rounds: int, prompt_tokens: int) -> dict[str, object]:
    firsts = [m.first_token_s for m in own.measurements if m.first_token_s is not None]
    steps = [second for measurement in own.measurements for second in measurement.seconds]
    medians = [own.step_seconds(turn) for turn in range(rounds)]
    rates = [
        measurement.bytes_per_step / median / 1e9 for measurement, median in zip(own.measurements, medians, strict=True)
    ]
    speedups = [baseline.step_seconds(turn) / median for turn, median in enumerate(medians)]
    bytes_per_step = statistics.mean(measurement.bytes_per_step for measurement in own.measurements)
    dense_bytes = statistics.mean(measurement.bytes_per_step for measurement in baseline.measurements)
    median = statistics.median(medians)
    return {
        "ffn_skip_ratio": statistics.mean(measurement.skip_ratio for measurement in own.measurements),
        "ms_per_token": median * 1e3,
        "ms_per_token_p20": quantile(steps, 0.2) * 1e3,
        "ms_per_token_p80": quantile(steps, 0.8) * 1e3,
        "tokens_per_s": system.batch_size / median,
        "prompt_tokens_per_s": system.batch_size * prompt_tokens / statistics.median(firsts) if firsts else None,
        "bytes_per_token": bytes_per_step,
        "gb_per_s": statistics.median(rates),
        "probe_gb_per_s": statistics.median(own.bandwidths),
        "floor_ms": bytes_per_step / statistics.median(own.bandwidths) / 1e6,
        "bandwidth_fraction": statistics.median(
            rate / bandwidth for rate, bandwidth in zip(rates, own.bandwidths, strict=True)
        ),
        "speedup_vs_dense": statistics.median(speedups),
        "speedup_p20": quantile(speedups, 0.2),
        "speedup_p80": quantile(speedups, 0.8),
        "ideal_speedup": dense_bytes / bytes_per_step,
    }
