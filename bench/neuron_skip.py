"""Decode steps that leave neurons out, beside dense ones: time against the bytes that are read.

For random weights of a model's shapes thresholds are set, layer by layer, so that wanted shares of gates and products
fall below them; what each step really left out is counted. ``of ideal`` is the time that the bytes left would take at
the dense step's rate, over the time taken: 1 means that the time follows the bytes.

    python bench/neuron_skip.py tinyllama-1.1b --rows 1
    python bench/neuron_skip.py tinyllama-1.1b --rows 4 --isa avx2

The dense program is timed twice: with down_proj as it usually lies, and transposed, one neuron a row. Beside the time
of each op stands the rate at which it read weights; the bandwidth probe tells what the memory gave.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from skipkernels.benchmark.bandwidth import bandwidth_gb_per_s
from skipkernels.benchmark.kernels import keep_neurons
from skipkernels.benchmark.shapes import SHAPES, shape_config
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights, random_weights
from skipkernels.program import build_program
from skipkernels.program.program import Variant
from skipkernels.program.state import DecodeState
from skipkernels.program.table import OPS
from skipkernels.skipping.policy import NeuronPolicy

KEPT = {"zero thresholds": (1.0, 1.0), "25 %": (0.75, 0.5), "40 %": (0.5, 0.3)}
"""Shares of gates and of products that stay; what they leave out of 1, summed and divided by 3, is the share of FFN
bytes left out."""
POSITION = 32


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
            max_seq_len=512,
            neurons=variant.neurons,
            dtype=weights.dtype,
        )
        program = build_program(config, weights, self.state, gated=variant.gated, neurons=variant.neurons)
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
            self.state.max_new_tokens[row] = 512
            self.state.start_decoding(row)
        self.seconds: list[float] = []

    def run(self) -> None:
        self.seconds += self.executor.run(1)

    def left_out(self) -> tuple[float, float]:
        """Shares of the FFN bytes not read in the last step: of a row alone, and of the union of all rows' neurons."""
        token = int(self.state.num_generated[0]) - 1
        size, layers = self.config.intermediate_size, self.config.num_hidden_layers
        kept = self.state.kept_map[:, token].double().sum(-1).mean()
        return float((2 - kept / size) / 3), (2 - sum(self.listed().values()) / size / layers) / 3

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
            share = listed.get(index, self.config.intermediate_size) / self.config.intermediate_size
            seconds[op] += took / steps
            read[op] += share * sum(matrix.nbytes for name, matrix in ins.matrices.items() if name != "embed_tokens")
        return {op: (took, read[op] / took) for op, took in seconds.items() if took > 1e-5}


def ffn_share(config: ModelConfig) -> float:
    """Of the bytes of weights that a step reads."""
    ffn = 3 * config.intermediate_size * config.hidden_size
    attention = (config.qkv_size + config.attention_size) * config.hidden_size
    return ffn / (ffn + attention + config.vocab_size * config.hidden_size / config.num_hidden_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    config = ModelConfig.from_hf(shape_config(options.model, 512))
    dtype = getattr(torch, options.dtype)
    usual, transposed = (random_weights(config, dtype, 512, neuron_rows=rows) for rows in (False, True))
    make = lambda name, weights, variant: Contender(name, config, weights, options.rows, variant, options.isa)  # noqa: E731
    contenders = [make("dense", usual, Variant()), make("dense, transposed", transposed, Variant())]
    for name, kept in KEPT.items():
        contender = make(name, transposed, Variant(neurons=True))
        keep_neurons(contender.executor, contender.state, *kept)
        contenders.append(contender)
    for contender in contenders:
        contender.run()
        contender.seconds.clear()
    for _ in range(options.steps):
        for contender in contenders:
            contender.run()
    dense = median(contenders[0].seconds)
    share = ffn_share(config)
    isa = contenders[0].executor.isa
    print(f"{options.model}, {options.dtype}, {options.rows} rows, {isa}; FFN {share:.1%} of the bytes of a step")
    for contender in contenders:
        own, union = contender.left_out() if "%" in contender.name else (0.0, 0.0)
        took = median(contender.seconds)
        ideal = dense * (1 - union * share)
        spread = (max(contender.seconds) - min(contender.seconds)) / took
        print(
            f"{contender.name:18} {1e3 * took:8.2f} ms  spread {spread:4.0%}  FFN bytes left out: row {own:5.1%}, "
            f"union {union:5.1%}  gain {dense / took:5.3f}  of ideal {ideal / took:5.3f}"
        )
    probe = bandwidth_gb_per_s(torch.device("cpu"), torch.get_num_threads())
    for contender in contenders:
        ops = contender.ops()
        shown = ", ".join(f"{op} {1e3 * took:.2f} ({rate / 1e9:.1f})" for op, (took, rate) in ops.items())
        choosing = sum(took for op, (took, _) in ops.items() if op in ("neuron_gate", "select_neurons"))
        print(f"{contender.name}: choosing {choosing / sum(took for took, _ in ops.values()):.2%}; ms (GB/s) {shown}")
    print(f"probe {probe:.1f} GB/s")


if __name__ == "__main__":
    main()
