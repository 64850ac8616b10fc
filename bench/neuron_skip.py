"""Decode steps that leave neurons out, beside dense ones: time against the bytes that are read.

For random weights of a model's shapes thresholds are set, layer by layer, so that wanted shares of gates and products
fall below them; what each step really left out is counted. ``of ideal`` is the time that the bytes left would take at
the dense step's rate, over the time taken: 1 means that the time follows the bytes.

    python -m bench.neuron_skip tinyllama-1.1b --rows 1
    python -m bench.neuron_skip tinyllama-1.1b --rows 4 --isa avx2
    python -m bench.neuron_skip tinyllama-1.1b --formats q8_0,q4_0,q4_1,q4_k_m --json neurons.json

The dense program is timed twice: with matrices as they usually lie, and with neurons one by one. Beside the time of
each op stands the rate at which it read weights; the bandwidth probe tells what the memory gave. Bytes are those of the
format: of a quantised down_proj, scales that 32 neurons share are read even where most of them are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.compare_llama_cpp import spread
from skipkernels.benchmark.bandwidth import bandwidth_gb_per_s
from skipkernels.benchmark.kernels import keep_neurons
from skipkernels.benchmark.shapes import SHAPES, shape_config
from skipkernels.benchmark.torch_ops import read_nbytes
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.executors.execution import Execution
from skipkernels.model.block_weights import load_in_formats
from skipkernels.model.config import ModelConfig, resolve_dtype
from skipkernels.model.random_parameters import RandomParameters
from skipkernels.model.recipe import RECIPES, matrix_formats
from skipkernels.model.weights import ModelWeights, expected_parameters, interleave, random_weights
from skipkernels.program import build_program
from skipkernels.program.program import Variant
from skipkernels.program.state import DecodeState
from skipkernels.program.table import OPS
from skipkernels.skipping.policy import NeuronPolicy
from skipkernels.support.machine import default_threads
from skipkernels.support.report import environment

KEPT = {"zero thresholds": (1.0, 1.0), "25 %": (0.75, 0.5), "40 %": (0.5, 0.3)}
"""Shares of gates and of products that stay; what they leave out of 1, summed and divided by 3, is the share of FFN
bytes left out."""
POSITION, MAX_SEQ_LEN = 32, 512


class Contender:
    """A program over weights of its own layout, ready to run steps."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        weights: ModelWeights,
        rows: int,
        variant: Variant,
        isa: str,
        prompt_rows: int = 0,
    ) -> None:
        self.name = name
        self.config = config
        self.state = DecodeState.allocate(
            config,
            num_sequences=rows,
            num_prompt_rows=prompt_rows,
            max_seq_len=MAX_SEQ_LEN,
            neurons=variant.neurons,
            dtype=weights.dtype,
        )
        program = build_program(config, weights, self.state, gated=variant.gated, neurons=variant.neurons)
        self.state.neuron_shares.copy_(weights.neuron_shares())
        self.executor = CpuExecutor(program, self.state, isa=isa)
        layers = config.num_hidden_layers
        policy = NeuronPolicy(gate_thresholds=(0.0,) * layers, warmup_tokens=0)
        blocks = self.state.num_blocks // rows
        generator = torch.Generator().manual_seed(0)
        for row in range(rows):
            tokens = torch.randint(config.vocab_size, (POSITION,), generator=generator, dtype=torch.int32)
            self.state.begin_sequence(row, tokens, 1)
            self.state.set_blocks(row, range(row * blocks, (row + 1) * blocks))
            self.state.set_policy(row, policy.plan(layers))
            self.state.max_new_tokens[row] = MAX_SEQ_LEN
            self.state.start_decoding(row)
        self.seconds: list[float] = []

    def run(self) -> None:
        self.seconds += self.executor.run(1)

    def left_out(self) -> tuple[float, float]:
        """Shares of the FFN bytes not read in the last step: of a row alone, and of the union of all rows' neurons."""
        token, size = int(self.state.num_generated[0]) - 1, self.config.intermediate_size
        shares = self.state.neuron_shares
        kept = self.state.kept_map[:, token] / self.state.neuron_counts[:, None]  # [rows, layers, 2]
        own = ((1 - kept) * shares).sum(-1).mean()
        if self.config.num_experts:  # no list tells what several rows read
            return float(own), float(own) if self.state.num_sequences == 1 else float("nan")
        listed = torch.tensor(list(self.listed().values())).view(-1, 2) / size  # up and down, layer by layer
        return float(own), float(((1 - listed) * shares).sum(-1).mean())

    def listed(self) -> dict[int, int]:
        """Neurons in the list that the instruction at an index reads, in a step."""
        found = {}
        for index, ins in enumerate(self.executor.program):
            if ins.tensors.get("neurons") is not None and ins.op != "select_neurons":
                found[index] = int(self.state.num_neurons)
            self.executor.run_instruction(index)
        return found

    def ops(self) -> dict[str, tuple[float, float]]:
        """Seconds of a step in each op, and bytes of matrices read per second."""
        listed, steps = self.listed(), 4
        seconds, read = dict.fromkeys(OPS, 0.0), dict.fromkeys(OPS, 0.0)
        for index, (op, took) in enumerate(self.executor.profile(steps)):
            ins = self.executor.program[index]
            seconds[op] += took / steps
            read[op] += sum(
                read_nbytes(matrix, listed.get(index))
                for name, matrix in ins.matrices.items()
                if name != "embed_tokens"
            )
        return {op: (took, read[op] / took) for op, took in seconds.items() if took > 1e-5}


def weights_of(config: ModelConfig, kind: str, neuron_rows: bool) -> ModelWeights:
    """Random ones, of a dtype or in the formats of a recipe, as the CPU executor reads them."""
    if kind not in RECIPES:
        return random_weights(config, resolve_dtype(kind), MAX_SEQ_LEN, neuron_rows=neuron_rows)
    shapes = expected_parameters(config)
    parameters = RandomParameters(shapes, matrix_formats(config, shapes, kind))
    weights = load_in_formats(parameters, config, MAX_SEQ_LEN, neuron_rows=neuron_rows)
    weights.rope_cos.fill_(1.0)
    weights.rope_sin.fill_(0.0)
    interleave(weights, default_threads())
    return weights


def contenders_of(config: ModelConfig, kind: str, rows: int, isa: str) -> tuple[list[Contender], float]:
    """Each ready to run, and the share of a step's bytes of weights that are an FFN's."""
    usual, singly = (weights_of(config, kind, neuron_rows) for neuron_rows in (False, True))
    share = config.num_hidden_layers * usual.ffn_nbytes() / usual.decode_nbytes()
    made = [
        Contender("dense", config, usual, rows, Variant(), isa),
        Contender("dense, neurons one by one", config, singly, rows, Variant(), isa),
    ]
    for name, kept in KEPT.items():
        contender = Contender(name, config, singly, rows, Variant(neurons=True), isa)
        keep_neurons(contender.executor, contender.state, *kept)
        made.append(contender)
    return made, share


def measured(contender: Contender, dense: Contender, share: float) -> dict[str, Any]:
    """What one contender's steps took, beside the dense ones of the same turns."""
    own, union = contender.left_out() if "%" in contender.name else (0.0, 0.0)
    gains = [other / took for took, other in zip(contender.seconds, dense.seconds, strict=True)]
    ideal = 1 / (1 - union * share)
    return {
        "name": contender.name,
        "ms": spread([1e3 * took for took in contender.seconds]),
        "left_out_of_a_row": own,
        "left_out": union,
        "ideal": ideal,
        "gain": spread(gains),
        "of_ideal": spread([gain / ideal for gain in gains]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--formats", default="bf16", help="dtypes and types of quantisation, separated by commas")
    parser.add_argument("--ops", action="store_true", help="also the time of each op")
    parser.add_argument("--json", type=Path, help="add what was measured to this file")
    options = parser.parse_args()
    config = ModelConfig.from_hf(shape_config(options.model, MAX_SEQ_LEN))
    for kind in options.formats.split(","):
        document = bench(config, kind, options)
        if options.json:
            found = json.loads(options.json.read_text()) if options.json.exists() else []
            options.json.write_text(json.dumps([*found, document], indent=1) + "\n")


def bench(config: ModelConfig, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """All contenders of one format, in turns; prints them."""
    contenders, share = contenders_of(config, kind, options.rows, options.isa)
    for contender in contenders:
        contender.run()
        contender.seconds.clear()
    for _ in range(options.steps):
        for contender in contenders:
            contender.run()
    isa = contenders[0].executor.isa
    print(f"{options.model}, {kind}, {options.rows} rows, {isa}; FFN {share:.1%} of the bytes of a step")
    rows = [measured(contender, contenders[0], share) for contender in contenders]
    for row in rows:
        ms, gain, of_ideal = (row[name] for name in ("ms", "gain", "of_ideal"))
        print(
            f"{row['name']:26} {ms['median']:7.2f} ms ({ms['p20']:.2f}..{ms['p80']:.2f})  FFN bytes left out "
            f"{row['left_out']:5.1%} (of a row {row['left_out_of_a_row']:5.1%})  gain {gain['median']:.3f} "
            f"({gain['p20']:.3f}..{gain['p80']:.3f}), ideal {row['ideal']:.3f}  of ideal {of_ideal['median']:.3f}",
            flush=True,
        )
    probe = bandwidth_gb_per_s(torch.device("cpu"), default_threads())
    print(f"probe {probe:.1f} GB/s")
    if options.ops:
        print_ops(contenders)
    return {
        "model": options.model,
        "format": kind,
        "rows": options.rows,
        "isa": isa,
        "steps": options.steps,
        "ffn_share": share,
        "probe_gb_per_s": probe,
        "environment": environment(Execution().resolved()),
        "contenders": rows,
    }


def print_ops(contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        ops = contender.ops()
        shown = ", ".join(f"{op} {1e3 * took:.2f} ({rate / 1e9:.1f})" for op, (took, rate) in ops.items())
        choosing = sum(took for op, (took, _) in ops.items() if op in ("neuron_gate", "select_neurons"))
        print(f"{contender.name}: choosing {choosing / sum(took for took, _ in ops.values()):.2%}; ms (GB/s) {shown}")


if __name__ == "__main__":
    main()
