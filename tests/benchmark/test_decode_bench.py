"""The decode bench: its arithmetic on systems whose times are known, and the command on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from skipkernels.benchmark import bandwidth, shapes
from skipkernels.benchmark import decode as bench
from skipkernels.benchmark.systems import Measurement, SkipkernelsSystem, TransformersSystem, module_over
from skipkernels.cli.app import app
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import fill_rope, random_weights
from skipkernels.program.table import OPS
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, NeuronPolicy, TimingPolicy
from skipkernels.support.report import with_peak_floor
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.real_models import smollm2_gguf

NEURON_OPS = {"neuron_gate", "gate_proj_act", "select_neurons", "up_proj_mul", "down_proj_neurons_add"}
EXPERT_OPS = {op for op in OPS if "experts" in op}
OF_A_LLAMA = set(OPS) - NEURON_OPS - EXPERT_OPS - {"branch_add", "norm_rope_append"}
"""What a Llama runs under a policy for whole blocks."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}


class Scripted:
    """A system whose turns take what the test says."""

    def __init__(self, name, milliseconds, *, policy=None, batch_size=1, bytes_per_step=1e9, skip_ratio=0.0):
        self.name, self.policy, self.batch_size = name, policy, batch_size
        self._turns = iter([milliseconds[0], *milliseconds])  # the first is the warm-up
        self._bytes, self._ratio = bytes_per_step, skip_ratio

    def decode(self, prompt_tokens, new_tokens):
        return Measurement([next(self._turns) / 1e3] * 3, self._ratio, self._bytes)

    def instruction_ms(self, prompt_tokens, new_tokens):
        return {"lm_head": 3.0, "skip_gate": 1.0}


@pytest.fixture
def probe_at_20_gb_per_s(monkeypatch):
    monkeypatch.setattr(bench, "bandwidth_gb_per_s", lambda device, threads: 20.0)


def run(systems, rounds):
    return bench.run_decode_bench(systems, prompt_tokens=4, new_tokens=4, rounds=rounds, num_threads=1)


def test_ratios_are_taken_within_a_round(probe_at_20_gb_per_s):
    # the machine slows down by 4 from round to round: medians of the times would say nothing of the ratio
    dense = Scripted("skipkernels", [100, 400, 1600], policy=DensePolicy(), bytes_per_step=2e9)
    skipping = Scripted("skipkernels", [50, 200, 800], policy=TimingPolicy(0.25), bytes_per_step=1.5e9, skip_ratio=0.25)
    rows = run([dense, skipping], rounds=3)
    assert [row["speedup_vs_dense"] for row in rows] == pytest.approx([1.0, 2.0])
    assert rows[1]["ideal_speedup"] == pytest.approx(2 / 1.5)
    assert rows[1]["policy"].startswith("timing only")


def test_bytes_and_bandwidth(probe_at_20_gb_per_s):
    (row,) = run([Scripted("skipkernels", [100], policy=DensePolicy(), batch_size=4, bytes_per_step=1.5e9)], rounds=1)
    assert row["gb_per_s"] == pytest.approx(15.0)
    assert row["bandwidth_fraction"] == pytest.approx(0.75)
    assert row["ms_per_token"] == pytest.approx(100)
    assert row["tokens_per_s"] == pytest.approx(40)
    assert row["skip_gate_fraction"] == pytest.approx(0.25)


class Failing(Scripted):
    """Fails in the turn that the test says, 0 being the warm-up."""

    def __init__(self, name, turn, **options):
        super().__init__(name, [10] * 9, **options)
        self._left = turn

    def decode(self, prompt_tokens, new_tokens):
        self._left -= 1
        if self._left < 0:
            raise ValueError("no such cache\nand more")
        return super().decode(prompt_tokens, new_tokens)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_peer_that_fails_is_a_row_and_costs_ours_nothing(probe_at_20_gb_per_s, turn):
    ours = Scripted("skipkernels", [10] * 3, policy=DensePolicy())
    rows = run([ours, Failing("other", turn), Scripted("third", [20] * 3)], rounds=3)
    assert rows[0]["ms_per_token"] == pytest.approx(10)
    assert rows[1]["error"] == "ValueError: no such cache"
    assert "ms_per_token" not in rows[1]
    assert rows[2]["speedup_vs_dense"] == pytest.approx(0.5)


def test_a_fault_of_ours_is_not_a_row(probe_at_20_gb_per_s):
    with pytest.raises(ValueError, match="no such cache"):
        run([Failing("skipkernels", 1, policy=DensePolicy())], rounds=3)


def test_rows_are_handed_out_after_every_round(probe_at_20_gb_per_s):
    seen = []
    systems = [Scripted("skipkernels", [10, 30], policy=DensePolicy()), Failing("other", 2)]
    bench.run_decode_bench(
        systems, prompt_tokens=4, new_tokens=4, rounds=2, num_threads=1, on_round=lambda rows: seen.append(rows)
    )
    assert [rows[0]["ms_per_token"] for rows in seen] == [pytest.approx(10), pytest.approx(20)]
    assert ["error" in rows[1] for rows in seen] == [False, True]


def test_floors_are_named(probe_at_20_gb_per_s):
    (row,) = run([Scripted("skipkernels", [100], policy=DensePolicy(), bytes_per_step=1.5e9)], rounds=1)
    assert row["floor_ms"] == pytest.approx(75)
    assert with_peak_floor({**row, "peak_gb_per_s": 30.0})["peak_floor_ms"] == pytest.approx(50)
    assert "peak_floor_ms" not in with_peak_floor(row)


def test_each_batch_size_has_its_own_baseline(probe_at_20_gb_per_s):
    systems = [
        Scripted("skipkernels", [10], policy=DensePolicy()),
        Scripted("other", [40]),
        Scripted("skipkernels", [30], policy=DensePolicy(), batch_size=8),
        Scripted("other", [60], batch_size=8),
    ]
    assert [row["speedup_vs_dense"] for row in run(systems, rounds=1)] == pytest.approx([1, 0.25, 1, 0.5])


def tiny_model(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    hf_config = shapes.shape_config("tiny", 64)
    config = ModelConfig.from_hf(hf_config)
    weights = random_weights(config, torch.bfloat16, 64)
    fill_rope(weights, hf_config)
    return config, weights, hf_config


def test_bytes_counted_are_the_bytes_of_what_ran(monkeypatch):
    config, weights, _ = tiny_model(monkeypatch)
    engine = Engine(config, weights, max_seq_len=64, max_batch_size=2)
    policy = FixedPolicy((2, 3), warmup_tokens=0)
    measured = SkipkernelsSystem(engine, policy, 2, list(range(64))).decode(prompt_tokens=4, new_tokens=5)
    assert measured.skip_ratio == pytest.approx(2 / 8)
    assert len(measured.seconds) == 4
    # written out: 8 attentions, 6 FFNs, lm_head and one embedding row, and the cache of 2 rows at lengths 5 to 8
    attention, ffn, head = (64 + 2 * 32 + 64) * 64, 3 * 96 * 64, 129 * 64
    cache = 2 * sum(2 * 8 * length * 2 * 16 for length in (5, 6, 7, 8)) / 4
    assert measured.bytes_per_step == pytest.approx(2 * (8 * attention + 6 * ffn + head + cache))


def test_bytes_of_single_neurons_are_counted(monkeypatch):
    config, _, hf_config = tiny_model(monkeypatch)
    weights = random_weights(config, torch.bfloat16, 64, neuron_rows=True)
    fill_rope(weights, hf_config)
    engine = Engine(config, weights, max_seq_len=64, max_batch_size=2)
    policy = NeuronPolicy(gate_thresholds=(0.02,) * 8, product_thresholds=(0.005,) * 8, warmup_tokens=0)
    system = SkipkernelsSystem(engine, policy, 2, list(range(64)))
    measured = system.decode(prompt_tokens=4, new_tokens=5)
    kept = engine.state.kept_map[:, 1:5].double()
    assert (kept[0] == kept[1]).all()
    rows = 8 * 96 + float(kept[0].sum()) / 4  # of gate_proj, up_proj and down_proj, in a step
    assert measured.skip_ratio == pytest.approx(1 - rows / (3 * 8 * 96), rel=1e-5)
    assert 0.1 < measured.skip_ratio < 0.6
    attention, head = (64 + 2 * 32 + 64) * 64, 129 * 64
    cache = 2 * sum(2 * 8 * length * 2 * 16 for length in (5, 6, 7, 8)) / 4
    assert measured.bytes_per_step == pytest.approx(2 * (8 * attention + 64 * rows + head + cache), rel=1e-6)


def test_bytes_of_experts_are_counted_from_what_was_read():
    """Two tokens of one step that choose the same experts read them once."""
    module = tiny_module("qwen3_moe with dense layers")  # 3 of 30 experts in all layers but one
    engine = tiny_engine(module=module, max_batch_size=2)
    policy = FixedPolicy((1, 2), warmup_tokens=0)
    system = SkipkernelsSystem(engine, policy, 2, random_prompt(4))
    measured = system.decode(prompt_tokens=4, new_tokens=5)
    # written out: 4 attentions, 2 FFNs of 3 experts and a router, lm_head and an embedding row, and the cache
    attention, ffn, head = (40 + 2 * 20 + 40) * 40, (3 * 3 * 24 + 30) * 40, 260 * 40
    dense_ffn = 3 * 72 * 40
    mean_ffn = (3 * ffn + dense_ffn) / 4  # two FFNs of the mean size are left out
    cache = 2 * sum(2 * 4 * length * 2 * 10 for length in (5, 6, 7, 8)) / 4
    assert measured.bytes_per_step == pytest.approx(4 * (4 * attention + 2 * mean_ffn + head + cache))

    prompts = [random_prompt(4, seed) for seed in (1, 2)]
    before = engine.state.experts_read.clone()
    answers = engine.generate(prompts, max_new_tokens=1, eos_token_ids=(), policy=policy)
    of_first = engine.state.experts_read - before
    before = engine.state.experts_read.clone()
    engine.loop.forget_prefixes()
    answers = engine.generate(prompts, max_new_tokens=5, eos_token_ids=(), policy=policy)
    read = engine.state.experts_read - before - of_first
    unread = np.stack([answer.unread_map[1:] for answer in answers]).min(axis=0)
    assert 4 * 3 < int(read[0]) <= 4 * 2 * 3  # the rows differ
    more = (int(read[0]) + int(read[3]) - 2 * 4 * 3) * 3 * 24 * 40 * 4 / 4
    assert system._nbytes_of_more_experts(read, unread) == pytest.approx(more)


def test_bytes_of_single_neurons_of_experts_are_counted():
    """Also where two rows choose the same experts and keep the same neurons."""
    engine = tiny_engine("qwen3_moe", max_batch_size=2, neuron_rows=True)
    policy = NeuronPolicy(gate_thresholds=(0.2,) * 4, product_thresholds=(0.1,) * 4, warmup_tokens=0)
    for rows in (1, 2):
        measured = SkipkernelsSystem(engine, policy, rows, random_prompt(4)).decode(prompt_tokens=4, new_tokens=5)
        kept = engine.state.kept_map[0, 1:5].double()  # of 2 experts of 24 neurons
        ffns = (4 * (6 + 2 * 24) + float(kept.sum()) / 4) * 40  # routers, gates, and what is kept of ups and downs
        attention, head = (2 * 4 * 6 + 2 * 2 * 6) * 40, 260 * 40
        cache = rows * sum(2 * 4 * length * 2 * 6 for length in (5, 6, 7, 8)) / 4
        assert measured.bytes_per_step == pytest.approx(4 * (4 * attention + ffns + head + cache), rel=1e-6)
        assert 0.1 < measured.skip_ratio < 0.6


def test_transformers_runs_on_the_same_storage(monkeypatch):
    config, weights, hf_config = tiny_model(monkeypatch)
    module = module_over(weights, config, hf_config)
    assert module.model.layers[3].mlp.down_proj.weight.data_ptr() == weights.layers[3].down_proj.data_ptr()
    measured = TransformersSystem(module, config, 2, list(range(64))).decode(prompt_tokens=4, new_tokens=5)
    assert len(measured.seconds) == 4
    ours = Engine(config, weights, max_seq_len=64).generate([[1, 2, 3]], max_new_tokens=8)[0].token_ids
    theirs = module.float().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert theirs[0, 3:].tolist() == ours


def test_the_command_writes_rows_and_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bandwidth, "PROBE_BYTES", 1 << 22)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = "--rounds 2 --new-tokens 4 --prompt-tokens 4 --threads 1 --batch-sizes 1,2 --against transformers"
    arguments = ["bench", "--shapes", "tiny", *options.split(), "--json", str(out), "--plot", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "timing only" in result.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [(row["system"], row["batch_size"]) for row in rows] == [
        (system, batch) for batch in (1, 2) for system in ("skipkernels", "skipkernels", "transformers")
    ]
    wanted = "system device dtype batch_size ffn_skip_ratio ms_per_token tokens_per_s bytes_per_token gb_per_s"
    wanted += " bandwidth_fraction speedup_vs_dense ideal_speedup versions commit"
    assert set(wanted.split()) <= set(rows[0])
    assert rows[1]["ffn_skip_ratio"] == pytest.approx(2 / 8)
    assert [row["skip_gate_fraction"] > 0 for row in rows] == [False, True, False] * 2
    assert set(rows[0]["instruction_ms"]) == OF_A_LLAMA - {"skip_gate"}
    assert picture.stat().st_size > 10_000


def test_unknown_shapes_name_the_known_ones():
    with pytest.raises(RequestError, match=r"unknown shapes 'gpt-5'.*tinyllama-1\.1b"):
        shapes.shape_config("gpt-5", 8)


def test_a_gguf_file_is_timed_in_its_own_formats() -> None:
    options = [
        "bench",
        "--model",
        str(smollm2_gguf()),
        "--skip-ratio",
        "0",
        "--rounds",
        "1",
        "--new-tokens",
        "4",
        "--prompt-tokens",
        "4",
    ]
    result = CliRunner().invoke(app, [*options, "--json", "-"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["dtype"] == "q4_1+q8_0"
    result = CliRunner().invoke(app, [*options, "--against", "transformers"])
    assert result.exit_code == 2
    assert "needs a Hugging Face checkpoint" in result.output
