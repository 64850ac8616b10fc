"""The kernel bench: what it counts as bytes, what it compares with, and the command on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from skipkernels.benchmark import bandwidth, shapes
from skipkernels.benchmark.statistics import quantile
from skipkernels.benchmark.torch_ops import bytes_of, torch_counterpart
from skipkernels.cli.app import app
from skipkernels.engine import Engine
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.skipping.policy import TimingPolicy
from tests.benchmark.test_decode_bench import OF_A_LLAMA, TINY
from tests.models import own_rows, random_prompt, tiny_engine, tiny_module

POSITIONS = 12


def place(engine: Engine, positions: int) -> None:
    own = own_rows(engine)
    for slot in range(engine.max_batch_size):
        own.begin(slot, random_prompt(positions))
    own.start()


def program():
    engine = tiny_engine(module=tiny_module(dtype=torch.bfloat16), max_batch_size=2)
    place(engine, POSITIONS)
    executor = engine.executor_for(TimingPolicy(0.0))
    assert isinstance(executor, CpuExecutor)
    return engine, {ins.op: ins for ins in executor.program}


def test_an_op_moves_its_matrix_or_the_cache_of_all_rows():
    engine, instructions = program()
    config, bf16 = engine.config, torch.bfloat16
    assert set(instructions) == OF_A_LLAMA
    layer = sum(bytes_of(instructions[op]) for op in ("qkv_rope_append", "o_proj_add"))
    assert layer == config.attention_bytes(bf16)
    assert sum(bytes_of(instructions[op]) for op in ("gate_up_act", "down_proj_add")) == config.ffn_bytes(bf16)
    assert bytes_of(instructions["lm_head"]) == config.vocab_size * config.hidden_size * 2
    per_layer = config.kv_bytes(POSITIONS, bf16) // config.num_hidden_layers
    assert bytes_of(instructions["decode_attention"]) == 2 * per_layer


def test_a_sliding_window_bounds_what_attention_moves():
    engine = tiny_engine("mistral with a sliding window")
    place(engine, 40)
    executor = engine.executor_for(engine.policy)
    (attention, *_) = [ins for ins in executor.program if ins.op == "decode_attention"]
    assert bytes_of(attention) == engine.config.kv_bytes(12, torch.float32) // engine.config.num_hidden_layers


def test_torch_has_a_counterpart_for_what_costs():
    _, instructions = program()
    with torch.inference_mode():
        results = {op: call() for op, ins in instructions.items() if (call := torch_counterpart(ins)) is not None}
    assert OF_A_LLAMA - set(results) == {"skip_gate", "advance"}
    assert results["down_proj_add"].shape == (2, 40)
    assert results["decode_attention"].shape == (2, 4, 1, 10)


def test_a_quantile_is_one_of_the_values():
    assert [quantile([5, 1, 3, 2, 4], fraction) for fraction in (0.0, 0.2, 0.5, 0.8, 1.0)] == [1, 2, 3, 5, 5]


def test_the_command_writes_rows_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bandwidth, "PROBE_BYTES", 1 << 22)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = "--shapes tiny --layers 2 --rounds 2 --batch-sizes 1,3 --kv-lengths 5,9 --threads 1"
    result = CliRunner().invoke(app, ["bench", "kernels", *options.split(), "--json", str(out), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "down_proj_add" in result.stdout
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(OF_A_LLAMA)
    assert {(row["batch_size"], row["kv_len"]) for row in rows} == {(1, 5), (1, 9), (3, 5), (3, 9)}
    for row in rows:
        assert row["us"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert (row["torch_us"] is None) == (row["op"] in ("skip_gate", "advance"))
    assert picture.read_bytes().startswith(b"\x89PNG")
