"""ShortGPT: transformers without the removed layers, and Block Influence from its hidden states."""

import pytest
import torch
from torch import nn

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods import layer_decoder
from skipkernels.methods.setup import Setup
from skipkernels.methods.short_gpt import ShortGPT, block_influence
from tests.methods.conftest import ALIKE, LAYERS
from tests.models import random_prompt, stock_tokens, tiny_engine, tiny_module
from tests.tolerances import assert_close

REMOVED = [2, 3, 7]


def shortened() -> tuple[Setup, torch.nn.Module]:
    """A setup on the whole model, and transformers' module without the removed layers."""
    setup = Setup(tiny_engine(module=tiny_module(num_hidden_layers=LAYERS)), [])
    module = tiny_module(num_hidden_layers=LAYERS)
    kept = [layer for index, layer in enumerate(module.model.layers) if index not in REMOVED]
    module.model.layers = nn.ModuleList(kept)
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    module.config.num_hidden_layers = len(kept)
    return setup, module


def test_removed_layers_are_gone_for_prompt_and_answer() -> None:
    setup, module = shortened()
    method = ShortGPT().build(setup, {"removed": REMOVED})
    prompt = random_prompt(9)
    (answer,) = method.generate([prompt], max_new_tokens=12, eos_token_ids=())
    assert answer.token_ids == stock_tokens(module, prompt, 12)
    assert answer.work.ffn_skip_ratio == pytest.approx(len(REMOVED) / LAYERS)
    assert answer.work.layer_bytes_saved == pytest.approx(len(REMOVED) / LAYERS)
    tokens = random_prompt(30, seed=3)
    (reading,) = method.score([Passage(tuple(tokens), 5)], keep_log_probs=True)
    with torch.inference_mode():
        expected = module(torch.tensor([tokens])).logits[0, 4:-1].log_softmax(-1)
    assert reading.all_log_probs is not None
    assert_close(reading.all_log_probs, expected, "logits after layers, fp32")


def test_a_layer_keeps_what_is_its_own() -> None:
    engine = tiny_engine("gemma3_text")
    removed = [1, 2]
    kept = [layer for layer in range(engine.config.num_hidden_layers) if layer not in removed]
    shorter = engine.without_layers(removed)
    assert shorter.config.num_hidden_layers == len(kept)
    assert shorter.config.sliding_windows == tuple(engine.config.sliding_windows[layer] for layer in kept)
    assert shorter.config.second_rope_layers == tuple(engine.config.second_rope_layers[layer] for layer in kept)
    assert [id(layer) for layer in shorter.weights.layers] == [id(engine.weights.layers[layer]) for layer in kept]
    assert len(set(shorter.config.sliding_windows)) == 2, "layers that are all alike would show nothing"


def test_block_influence_is_that_of_transformers_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_decoder, "_CHUNK", 16)  # a passage may be longer than what is read at a time
    module = tiny_module(num_hidden_layers=LAYERS)
    tokens = torch.tensor(random_prompt(40))
    expected = []
    with torch.inference_mode():
        states = []
        hooks = [  # before the final norm, which output_hidden_states applies to the last
            layer.register_forward_hook(lambda _, given, out: states.append((given[0][0], out[0])))
            for layer in module.model.layers
        ]
        module(tokens[None])
        for hook in hooks:  # an engine would not call them
            hook.remove()
        for before, after in states:
            norms = before.norm(dim=-1) * after.norm(dim=-1)
            expected.append(1 - ((before * after).sum(-1) / norms).mean())
    decoder = Setup(tiny_engine(module=module), []).layer_decoder
    torch.testing.assert_close(block_influence(decoder, tokens), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_the_least_influential_layers_are_removed(setup: Setup) -> None:
    removed = ShortGPT().find(setup, 0.25, ALIKE)["removed"]
    influence = setup.memory["block influence"]
    assert len(influence) == LAYERS
    assert len(removed) == 3  # 2.5 layers of 10, rounded up
    others = [influence[layer] for layer in range(LAYERS) if layer not in removed]
    assert max(influence[layer] for layer in removed) <= min(others)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.99])
def test_an_impossible_ratio_names_the_possible_ones(setup: Setup, ratio: float) -> None:
    with pytest.raises(PolicyError, match=r"ratios from 0\.100 to 0\.900"):
        ShortGPT().find(setup, ratio, ALIKE)
