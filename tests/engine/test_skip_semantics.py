"""FFN-SkipLLM's rule, rendered literally on the Hugging Face module, decides the same skips and tokens."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from skipkernels.skipping.policy import SkipPolicy
from tests.models import random_prompt, stock_tokens, tiny_engine, tiny_module
from tests.tolerances import TOLERANCES, assert_close

LAYERS = 8
NEW_TOKENS = 24
PROMPTS = [random_prompt(9, seed) for seed in range(8)]


@dataclass
class Rendering:
    """What the slow rendering decoded."""

    tokens: list[int] = field(default_factory=list)
    skipped: list[list[bool]] = field(default_factory=list)
    similarity: list[list[float]] = field(default_factory=list)  # of every FFN that ran, NaN elsewhere


def decode_literally(
    module: PreTrainedModel,
    prompt: list[int],
    new_tokens: int,
    *,
    threshold: float,
    span: int | None,
    cold_start: int,
    cold_end: int,
    warmup_tokens: int,
) -> Rendering:
    """One row, token by token and layer by layer, as the rule reads."""
    result = Rendering()
    model, layers = module.model, len(module.model.layers)
    cache = DynamicCache(config=module.config)
    token_ids, position = torch.tensor([prompt]), 0
    for generated in range(new_tokens):
        positions = torch.arange(position, position + token_ids.shape[1])[None]
        hidden = model.embed_tokens(token_ids)
        dense = generated == 0 or generated < warmup_tokens  # the prefill gives the first token
        causal = torch.full((token_ids.shape[1],) * 2, -math.inf).triu(1)[None, None]
        to_skip = 0
        skipped, similarities = [], []
        for index, layer in enumerate(model.layers):
            kind = (module.config.layer_types[index],) if module.config.model_type in ("gemma3_text", "olmo3") else ()
            norms = norms_of(layer)
            attended, _ = layer.self_attn(
                hidden_states=norms["attention"](hidden),
                position_embeddings=model.rotary_emb(hidden, positions, *kind),
                attention_mask=causal,
                position_ids=positions,
                past_key_values=cache,
            )
            h = hidden + norms["after attention"](attended)
            middle = cold_start <= index < layers - cold_end
            if middle and to_skip > 0:
                to_skip -= 1
                hidden = h
                skipped.append(True)
                similarities.append(math.nan)
                continue
            # the similarity is that across the whole branch, its second norm and its experts' router included
            branch = layer.mlp(norms["FFN"](h))
            hidden = h + norms["after FFN"](branch[0] if isinstance(branch, tuple) else branch)
            similarity = float(F.cosine_similarity(h[0, -1], hidden[0, -1], dim=0))
            skipped.append(False)
            similarities.append(similarity)
            if middle and not dense and similarity >= threshold:
                to_skip = layers if span is None else span
        position += token_ids.shape[1]
        logits = module.lm_head(model.norm(hidden))[0, -1]
        token_ids = logits.argmax().view(1, 1)
        result.tokens.append(int(token_ids))
        result.skipped.append(skipped)
        result.similarity.append(similarities)
    return result


def norms_of(layer: torch.nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The norms in front of attention and FFN, and behind them; families have the ones, the others or both."""
    ffn, after_ffn = (getattr(layer, f"{place}_feedforward_layernorm", None) for place in ("pre", "post"))
    attention, after_attention = getattr(layer, "input_layernorm", None), layer.post_attention_layernorm
    if after_ffn is None:  # what is called so stands behind attention, and in front of the FFN
        ffn, after_attention = after_attention, None
    found = {"attention": attention, "after attention": after_attention, "FFN": ffn, "after FFN": after_ffn}
    return {place: norm or torch.nn.Identity() for place, norm in found.items()}


def thresholds(module: PreTrainedModel) -> list[float]:
    """Quantiles of the similarities of a dense decoding, so that tests really skip some and run some."""
    with torch.inference_mode():
        rendering = decode_literally(
            module, PROMPTS[0], NEW_TOKENS, threshold=2.0, span=None, cold_start=0, cold_end=0, warmup_tokens=0
        )
    return np.quantile(rendering.similarity, [0.3, 0.6, 0.9]).tolist()


def clear_cut(module: PreTrainedModel, threshold: float, rule: dict) -> tuple[list[int], Rendering]:
    """The first prompt in whose decoding no decision hangs on rounding."""
    for prompt in PROMPTS:
        with torch.inference_mode():
            rendering = decode_literally(module, prompt, NEW_TOKENS, threshold=threshold, **rule)
        if np.nanmin(np.abs(np.array(rendering.similarity) - threshold)) > TOLERANCES["similarity"].atol:
            return prompt, rendering
    pytest.fail("every prompt has a similarity too near the threshold to compare decisions")


@functools.cache
def module_of(family: str) -> PreTrainedModel:
    """Sliding layers have a window that holds all: among full ones they differ in their rotary embeddings."""
    windows = {"sliding_window": 256} if family in ("gemma2", "gemma3_text", "gpt_oss", "olmo3") else {}
    return tiny_module(family, num_hidden_layers=LAYERS, attn_implementation="eager", **windows)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return module_of("llama")


def test_the_rendering_without_skips_is_stock_decoding(llama: PreTrainedModel) -> None:
    with torch.inference_mode():
        rendering = decode_literally(
            llama, PROMPTS[0], NEW_TOKENS, threshold=2.0, span=None, cold_start=1, cold_end=1, warmup_tokens=0
        )
    assert rendering.tokens == stock_tokens(llama, PROMPTS[0], NEW_TOKENS)
    assert not np.any(rendering.skipped)


def _id(part: object) -> str:
    return "-".join(map(str, part.values())) if isinstance(part, dict) else str(part)


RULES = [
    {"span": span, "cold_start": cold_start, "cold_end": cold_end, "warmup_tokens": warmup}
    for span, cold_start, cold_end, warmup in [
        (None, 1, 1, 0),
        (None, 0, 0, 1),
        (None, 3, 2, 5),
        (1, 0, 0, 0),
        (1, 1, 1, 5),
        (2, 2, 0, 0),
        (2, 0, 3, 1),
        (3, 1, 1, 0),
        (3, 0, 0, 5),
    ]
]


FAMILIES = ["llama", "qwen3", "gemma3_text", "gemma2", "olmo2", "qwen3_moe"]
MORE_FAMILIES = ["gpt_oss", "olmo3", "ministral3", "phi3 with partial rotary"]
CASES = [
    *((family, quantile, rule) for family in FAMILIES for quantile in range(3) for rule in RULES),
    *((family, 1, rule) for family in MORE_FAMILIES for rule in RULES[4:6]),
]


@pytest.mark.parametrize(("family", "quantile", "rule"), CASES, ids=_id)
def test_the_same_skips_and_tokens(family: str, quantile: int, rule: dict) -> None:
    module = module_of(family)
    policy = SkipPolicy(threshold=thresholds(module)[quantile], **rule)
    prompt, expected = clear_cut(module, policy.threshold, rule)
    (actual,) = tiny_engine(module=module, policy=policy).generate(prompt, max_new_tokens=NEW_TOKENS)
    assert actual.skip_map.tolist() == expected.skipped
    assert actual.token_ids == expected.tokens
    assert actual.skip_ratio == np.mean(expected.skipped)
    measured = ~np.isnan(actual.similarity_map)
    tested = range(rule["cold_start"], LAYERS - rule["cold_end"] - 1)
    assert measured[:, [layer for layer in range(LAYERS) if layer not in tested]].sum() == 0
    assert (measured[:, tested] == ~actual.skip_map[:, tested]).all()
    assert_close(
        torch.from_numpy(actual.similarity_map[measured]),
        torch.tensor(expected.similarity, dtype=torch.float32)[torch.from_numpy(measured)],
        "similarity",
    )


def test_the_rules_skip_some_and_run_some(llama: PreTrainedModel) -> None:
    """What keeps the comparison above from being one of dense decodings."""
    for threshold in thresholds(llama):
        with torch.inference_mode():
            rendering = decode_literally(
                llama, PROMPTS[0], NEW_TOKENS, threshold=threshold, span=1, cold_start=0, cold_end=0, warmup_tokens=0
            )
        assert 0.02 < np.mean(rendering.skipped) < 0.6


def test_one_threshold_per_layer_is_compared_with_its_own_layer(llama: PreTrainedModel) -> None:
    """Only layer 2 can trigger, so only layer 3 is skipped."""
    never = [1.0] * LAYERS
    never[2] = -1.0
    policy = SkipPolicy(layer_thresholds=tuple(never), span=1, warmup_tokens=0)
    (answer,) = tiny_engine(module=llama, policy=policy).generate(PROMPTS[0], max_new_tokens=6)
    assert np.argwhere(answer.skip_map).tolist() == [[token, 3] for token in range(1, 6)]
