"""What neurons and blocks cost: as on Hugging Face's module; thresholds that save what was wanted where it is cheap."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from skipkernels.calibration import forced_reading
from skipkernels.calibration.forced_reading import divergence, read_dense
from skipkernels.calibration.neuron_profile import NeuronProfile, _scales, probes, profile_neurons
from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.calibration.scoring import score
from skipkernels.calibration.tuning import Decoder
from skipkernels.cli.builtin_text import demo_streams
from skipkernels.demo import demo_model_path
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import FixedPolicy
from skipkernels.skipping.up_scales import UpScales
from tests.models import random_prompt, tiny_engine, tiny_module

LAYERS, PROMPT, NEW = 4, 6, 30
PASSAGES = [Passage(tuple(random_prompt(PROMPT + NEW, seed)), PROMPT) for seed in range(4)]


def constructed(sensitivity: list[float], scales: tuple[float, ...] = (1.0,) * 8) -> NeuronProfile:
    """Layers with the same neurons, that differ in what these cost."""
    rng = np.random.default_rng(0)
    size = (1000, len(scales))
    gates = torch.tensor(rng.exponential(1.0, size), dtype=torch.float32)
    products = gates * torch.tensor(np.abs(rng.normal(0, 1, size)) * np.array(scales), dtype=torch.float32)
    count = len(sensitivity)
    nothing = np.zeros((1, count), np.float32)
    return NeuronProfile(
        [gates] * count, [products] * count, UpScales.of([scales] * count), sensitivity, nothing, nothing
    )


@torch.inference_mode()
def module_log_probs(module, passage: Passage, layer: int | None) -> torch.Tensor:
    """Of transformers' module, one FFN left out past the prompt."""

    def without(mlp, inputs, output):
        x = inputs[0]
        products = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        products[:, PROMPT:] = 0
        return mlp.down_proj(products)

    hook = module.model.layers[layer].mlp.register_forward_hook(without) if layer is not None else None
    logits = module(torch.tensor([passage.token_ids[:-1]])).logits[0, PROMPT - 1 :]
    if hook is not None:
        hook.remove()
    return logits.log_softmax(-1)


def test_the_cost_of_a_block_is_that_of_the_module_without_it() -> None:
    module = tiny_module()
    engine = tiny_engine(module=module)
    profile = profile_neurons(engine, PASSAGES[:2])
    assert profile.block_kl.shape == (2 * (NEW - 1), LAYERS)
    for layer in range(LAYERS):
        costs = []
        for passage in PASSAGES[:2]:
            dense, other = (module_log_probs(module, passage, index) for index in (None, layer))
            costs.append((dense.exp() * (dense - other)).sum(-1)[1:])
        np.testing.assert_allclose(profile.block_kl[:, layer], torch.cat(costs), rtol=2e-3, atol=1e-5)


def test_what_changes_nothing_costs_nothing_and_the_first_token_is_never_changed() -> None:
    engine = tiny_engine()
    dense = read_dense(engine, PASSAGES[0])
    for layer in range(LAYERS):
        same = divergence(engine, dense, layer, lambda index, gate, up: gate * up)
        assert same.abs().max() < 1e-6
    profile = profile_neurons(engine, PASSAGES)
    assert min(profile.sensitivity) > 0
    assert profile.block_kl.shape[0] == 3 * (NEW - 1)  # three passages are probed


@pytest.mark.parametrize("split", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("saving", [0.05, 0.25, 0.5])
def test_thresholds_save_what_was_wanted(saving: float, split: float) -> None:
    profile = constructed([0.1, 0.2, 0.4])
    gates, products = profile.thresholds(saving, split)
    assert profile.unread(gates, products) == pytest.approx(saving, abs=0.002)
    policy = profile.policy(saving, split, 7)
    assert policy.warmup_tokens == 7
    assert policy.gate_thresholds == pytest.approx(gates, rel=1e-5)


def test_a_layer_that_costs_more_keeps_more() -> None:
    gates, products = constructed([0.1, 0.2, 0.4]).thresholds(0.3, 1.0)
    assert products[0] == pytest.approx(2 * products[1]) == pytest.approx(4 * products[2])
    assert gates == pytest.approx(products)  # where ups are 1


def test_unread_counts_a_gate_twice_and_a_product_once() -> None:
    """gate_proj is read in full, a third of the bytes."""
    profile = constructed([1.0])
    assert profile.unread([np.inf], [0.0]) == pytest.approx(2 / 3)
    assert profile.unread([0.0], [np.inf]) == pytest.approx(1 / 3)
    assert profile.unread([0.0], [0.0]) == 0.0


def test_scales_are_the_root_mean_square_of_each_neurons_up_past_the_prompt() -> None:
    """Against transformers' module, in float16, which is how a policy file stores them."""
    module = tiny_module()
    ups: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.mlp.up_proj.register_forward_hook(lambda _, __, out, index=index: ups[index].append(out[0, PROMPT:]))
        for index, layer in enumerate(module.model.layers)
    ]
    with torch.inference_mode():
        for passage in PASSAGES[:2]:
            module(torch.tensor([passage.token_ids[:-1]]))
    for hook in hooks:
        hook.remove()
    profile = profile_neurons(tiny_engine(module=module), PASSAGES[:2])
    expected = torch.stack([torch.cat(layer).square().mean(0).sqrt() for layer in ups])
    np.testing.assert_allclose(profile.up_scales.values.astype(np.float32), expected, rtol=2e-3)
    policy = profile.policy(0.2, 1.0, 1)
    assert policy.up_scales == profile.listed_scales
    assert np.unique(profile.up_scales.values).size > LAYERS  # of neurons, not of layers


def test_a_neuron_that_is_never_used_has_a_scale_above_0_and_one_that_is_not_finite_is_refused() -> None:
    found = _scales(np.array([[0.0, 1e-30, 0.5, 1e9]])).values
    assert found.tolist() == [[2.0**-14, 2.0**-14, 0.5, 65504.0]]
    with pytest.raises(PolicyError, match="up_scales"):
        _scales(np.array([[1.0, np.nan]]))


def test_a_gate_that_meets_a_large_up_is_kept_though_it_is_small() -> None:
    """As the executors test it: a gate below its layer's threshold divided by the neuron's own scale is left out."""
    scales = (0.1, 0.5, 1.0, 4.0)
    profile = constructed([1.0], scales)
    (a,), _ = profile.thresholds(0.3, 1.0)
    kept = [float((profile.gates[0][:, j] >= a / s).float().mean()) for j, s in enumerate(scales)]
    assert kept == sorted(kept)
    assert kept[3] > 2 * kept[0]
    missing = 1 - np.mean(kept)
    assert profile.unread([a], [0.0]) == pytest.approx(2 / 3 * missing, abs=1e-3)


def test_cats_takes_the_same_share_of_every_layers_gates() -> None:
    profile = constructed([0.1, 0.4])
    policy = profile.uniform_gates(0.2, 1)
    assert policy.product_thresholds == ()
    assert profile.unread(policy.gate_thresholds, (0.0, 0.0)) == pytest.approx(0.2, abs=0.005)
    assert policy.gate_thresholds[0] == policy.gate_thresholds[1]


def test_probes_are_counted() -> None:
    seen: list[int] = []
    profile_neurons(tiny_engine(), PASSAGES, seen.append)
    assert sum(seen) == probes(PASSAGES, LAYERS) == 3 * LAYERS


@pytest.mark.parametrize("saving", [0.1, 0.24, 0.4])
def test_quantiles_of_one_text_save_what_they_promise_on_another(saving: float) -> None:
    """Within a point, on a trained model, before any tuning: the saving of a decode, from dense activations."""
    assert trained_saving(saving) == pytest.approx(saving, abs=0.01)


@cache
def trained() -> tuple[NeuronProfile, Decoder]:
    engine = Engine.from_pretrained(demo_model_path(), max_batch_size=8, neuron_rows=True)
    search, held_out = cut_passages(engine, demo_streams(engine.tokenizer)[:1], 16, 32, 64)
    return profile_neurons(engine, search), Decoder(engine, held_out, lambda tokens: None)


def trained_saving(saving: float) -> float:
    profile, decoder = trained()
    policy = profile.policy(saving / decoder.share_past_warmup(1), 1.0, 1)
    return decoder.try_out("neurons", policy, saving, 1).comparison.skip_ratio


def test_of_experts_in_blocks_what_whole_ffns_cost_is_read() -> None:
    """As decoding without them makes it, whose activations are int8, not bf16; there are no neurons to leave out."""
    module = tiny_module("mixtral", hidden_size=64, intermediate_size=64)
    engine, (passage, *_) = tiny_engine(module=module, dtype="q8_0"), PASSAGES
    profile = profile_neurons(engine, [passage])
    assert (profile.layers, profile.most) == (4, 0.0)
    assert profile.block_kl.shape == profile.similarities.shape == (passage.decoded_tokens - 1, 4)
    decoder = Decoder(engine, [passage], lambda tokens: None)
    for layer in range(4):
        policy = FixedPolicy(layers=(layer,), warmup_tokens=1)
        trial = decoder.try_out("fixed", policy, 0.25, 1)
        # both past the first token, which runs in full
        assert trial.comparison.kl == pytest.approx(profile.block_kl[:, layer].mean(), rel=0.05)


@pytest.mark.parametrize("isas", [("avx512_bf16", "generic"), ("avx2", "generic")])
def test_bf16_is_read_in_fp32_where_the_processor_has_no_products_of_it(
    monkeypatch: pytest.MonkeyPatch, isas: tuple[str, ...]
) -> None:
    engine = tiny_engine(module=tiny_module(dtype=torch.bfloat16))
    monkeypatch.setattr(forced_reading, "_C", SimpleNamespace(usable_isas=lambda: isas))
    reading = read_dense(engine, PASSAGES[0])
    native = "avx512_bf16" in isas
    assert reading.weights.layers[0].down_proj.dtype == (torch.bfloat16 if native else torch.float32)
    assert (reading.weights is engine.weights) is native
    (decoded,) = score(engine, [PASSAGES[0]], keep_log_probs=True)
    torch.testing.assert_close(reading.log_probs, decoded.all_log_probs, atol=0.05, rtol=0.0)


def test_of_experts_the_thresholds_are_the_layers_and_save_what_is_wanted() -> None:
    """Also those whose biases would still be added without any neuron (gpt-oss), and a layer without experts."""
    for family in ("gpt_oss", "qwen3_moe with dense layers"):
        engine = tiny_engine(family, neuron_rows=True)
        profile = profile_neurons(engine, PASSAGES[:2])
        assert [gates.shape[1] for gates in profile.gates] == [engine.config.neurons_of(layer) for layer in range(4)]
        assert profile.most == pytest.approx(float(engine.weights.neuron_shares().sum(-1).mean()))
        policy = profile.policy(0.3, 1.0, 1)
        assert profile.unread(policy.gate_thresholds, policy.product_thresholds) == pytest.approx(0.3, abs=0.01)
        decoder = Decoder(engine, PASSAGES[:2], lambda tokens: None)
        measured = decoder.try_out("neurons", policy, 0.3, 1).comparison.skip_ratio
        assert measured == pytest.approx(0.3 * decoder.share_past_warmup(1), abs=0.03)


class Impatient:
    """Somebody asks in every layer."""

    def __init__(self) -> None:
        self.asked = self.waited = 0

    @property
    def wanted(self) -> bool:
        self.asked += 1
        return True

    def wait(self) -> None:
        self.waited += 1


def test_a_reading_makes_room_after_every_layer_and_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, others, rows = tiny_engine(), Impatient(), 0
    alone = profile_neurons(engine, PASSAGES[:2])
    own_rows, layers = engine.loop.own_rows, engine.config.num_hidden_layers

    def counted() -> Any:
        nonlocal rows
        rows += 1
        return own_rows()

    monkeypatch.setattr(engine.loop, "own_rows", counted)
    beside = profile_neurons(engine, PASSAGES[:2], others=others)
    assert rows == others.asked == 2 * (layers + 2 * sum(range(1, layers + 1))), "once for each layer that is read"
    assert beside.sensitivity == alone.sensitivity
    np.testing.assert_array_equal(beside.block_kl, alone.block_kl)
    for gates, same in zip(beside.gates, alone.gates, strict=True):
        assert torch.equal(gates, same)
    before = others.waited
    policy = beside.policy(0.3, 1.0, 1, others.wait)
    assert policy == alone.policy(0.3, 1.0, 1)
    assert others.waited - before == 30 * layers
