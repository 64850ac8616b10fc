"""The layer decoder: the engine's logits when nothing is left out, and transformers' layers for what is."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from skipkernels import _C
from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import score
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.methods import layer_decoder
from skipkernels.methods.layer_decoder import EveryLayer, LayerDecoder
from skipkernels.model.config import ModelConfig
from skipkernels.skipping.policy import DensePolicy
from tests.models import FAMILIES, random_prompt, tiny_engine, tiny_module
from tests.tolerances import assert_close

PROMPT, TOKENS = 20, 12


def decoder_of(module: PreTrainedModel) -> LayerDecoder:
    engine = tiny_engine(module=module)
    return LayerDecoder(engine.config, engine.weights, engine.max_seq_len)


class Table:
    """Token ``step`` runs the layers of ``table[step]``; the prompt runs all."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.where(step < 0, True, self._table[step.clamp(min=0), layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_layer_it_is_the_engine(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module(family, dtype=dtype)
    if ModelConfig.from_hf(module.config).num_experts:
        # a processor's bf16 products round activations, so that a router may choose another expert
        isas = [isa for isa in _C.usable_isas() if isa != "avx512_bf16"]
        monkeypatch.setitem(CpuExecutor.__init__.__kwdefaults__, "isa", isas[0])
    engine = tiny_engine(module=module)
    decoder = LayerDecoder(engine.config, engine.weights, engine.max_seq_len)
    tokens = random_prompt(PROMPT + TOKENS)
    (expected,) = score(engine, [Passage(tuple(tokens), 1)], DensePolicy(), keep_log_probs=True)
    hidden, ran = decoder.read(torch.tensor(tokens[:-1]), EveryLayer(), 0)
    assert ran.all()
    assert ran.shape == (PROMPT + TOKENS - 1, engine.config.num_hidden_layers)
    assert expected.all_log_probs is not None
    name = "logits after layers, fp32" if dtype == torch.float32 else "logits after layers, bf16"
    assert_close(decoder.logits(hidden).log_softmax(-1), expected.all_log_probs, name, family)


@pytest.mark.parametrize("family", ["llama", "mistral with a sliding window", "qwen3"])
def test_tokens_read_together_and_one_by_one_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_decoder, "_CHUNK", 7)
    decoder = decoder_of(tiny_module(family))
    tokens = torch.tensor(random_prompt(PROMPT + TOKENS))
    table = Table(torch.rand((TOKENS, 4), generator=torch.Generator().manual_seed(1)) < 0.6)
    together, ran_together = decoder.read(tokens, table, -PROMPT)
    decoder.begin()
    parts = [decoder.read(tokens[:PROMPT], table, -PROMPT)]
    parts += [decoder.read(token[None], table, step) for step, token in enumerate(tokens[PROMPT:])]
    alone, ran_alone = (torch.cat(part) for part in zip(*parts, strict=True))
    assert torch.equal(ran_together, ran_alone)
    assert not ran_together.all()
    assert_close(together, alone, "logits after layers, fp32")


@pytest.mark.parametrize("family", ["llama", "mistral with a sliding window", "qwen3", "qwen2"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@torch.inference_mode()
def test_a_skipped_layer_caches_the_state_that_passes_it(family: str, depth: int) -> None:
    module = tiny_module(family)
    decoder = decoder_of(module)
    tokens = torch.tensor(random_prompt(PROMPT + 2))
    leaves_at_depth = torch.tensor([[layer < depth for layer in range(4)], [True] * 4])
    hidden, _ = decoder.read(tokens, Table(leaves_at_depth), -PROMPT)

    cache = DynamicCache(config=module.config)
    module(tokens[None, :PROMPT], past_key_values=cache)
    streams = module(tokens[None, : PROMPT + 1], output_hidden_states=True).hidden_states
    passing = [streams[min(index, depth)][:, -1:] for index in range(4)]
    append_entry(module, cache, passing)
    expected = module(tokens[None, PROMPT + 1 :], past_key_values=cache).logits[0]
    assert_close(hidden[PROMPT], streams[depth][0, -1], "logits after layers, fp32", "state at the exit")
    assert_close(decoder.logits(hidden[-1:]), expected, "logits after layers, fp32", "the token after it")


def append_entry(module: PreTrainedModel, cache: DynamicCache, streams: list[torch.Tensor]) -> None:
    """Caches one token by transformers' own projections of what passed each layer, [1, 1, hidden] each."""
    for index, (layer, stream) in enumerate(zip(module.model.layers, streams, strict=True)):
        x, attention = layer.input_layernorm(stream), layer.self_attn
        shape = (1, 1, -1, attention.head_dim)
        key, value = attention.k_proj(x).view(shape), attention.v_proj(x).view(shape).transpose(1, 2)
        key = (attention.k_norm(key) if hasattr(attention, "k_norm") else key).transpose(1, 2)
        cos, sin = module.model.rotary_emb(stream, torch.tensor([[PROMPT]]))
        first, second = key.chunk(2, dim=-1)
        cache.update(key * cos + torch.cat((-second, first), dim=-1) * sin, value, index)


def test_what_a_token_does_not_run_it_does_not_feel() -> None:
    module = tiny_module()
    decoder = decoder_of(module)
    tokens = torch.tensor(random_prompt(6))
    without_layer_2 = Table(torch.tensor([[True, True, False, True]] * 6))
    expected, _ = decoder.read(tokens, without_layer_2, 0)
    with torch.no_grad():
        for parameter in module.model.layers[2].parameters():
            parameter.fill_(float("nan"))
    poisoned = decoder_of(module)
    hidden, _ = poisoned.read(tokens, without_layer_2, 0)
    assert torch.equal(hidden, expected)
    everything, _ = poisoned.read(tokens, EveryLayer(), 0)
    assert everything.isnan().all()
