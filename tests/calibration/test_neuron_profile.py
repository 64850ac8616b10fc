"""What neurons and blocks cost: as on Hugging Face's module; thresholds that save what was wanted where it is cheap."""

import numpy as np
import pytest
import torch

from skipkernels.calibration.forced_reading import divergence, read_dense
from skipkernels.calibration.neuron_profile import NeuronProfile, probes, profile_neurons
from skipkernels.calibration.passages import Passage
from tests.models import random_prompt, tiny_engine, tiny_module

LAYERS, PROMPT, NEW = 4, 6, 30
PASSAGES = [Passage(tuple(random_prompt(PROMPT + NEW, seed)), PROMPT) for seed in range(4)]


def constructed(sensitivity: list[float]) -> NeuronProfile:
    """Layers with the same neurons, that differ in what these cost."""
    rng = np.random.default_rng(0)
    gates = torch.tensor(rng.exponential(1.0, 5000), dtype=torch.float32)
    products = gates * torch.tensor(np.abs(rng.normal(0, 1, 5000)), dtype=torch.float32)
    count = len(sensitivity)
    nothing = np.zeros((1, count), np.float32)
    return NeuronProfile([gates] * count, [products] * count, [1.0] * count, sensitivity, nothing, nothing)


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
