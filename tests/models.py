"""Tiny models of every supported family, with weights on which a mistake shows."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from skipkernels.decoding.own_rows import OwnRows
from skipkernels.engine import Engine

VOCAB = 259  # the bytes, <s>, </s>, and one that is no token of the tokenizer
BOS, EOS = 256, 257

_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


_LLAMA3_ROPE = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

_GEMMA3_ROPE = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
}

# every irregularity that ModelConfig absorbs
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama with one kv head": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama with llama3 rope": (LlamaConfig, _LLAMA3_ROPE),
    "llama with linear rope": (LlamaConfig, _rope("linear", factor=4.0)),
    "llama with yarn rope": (LlamaConfig, _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama with attention bias": (LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral with a sliding window": (MistralConfig, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with sliding layers": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 20}),
    "qwen3 with sliding layers and bias": (
        Qwen3Config,
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    # five sliding layers to one full; the full ones' rotary embeddings turn more slowly
    "gemma3_text": (
        Gemma3TextConfig,
        {"num_hidden_layers": 7, "head_dim": 20, "sliding_window": 12, "query_pre_attn_scalar": 24, **_GEMMA3_ROPE},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 6,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    # layers without experts, a window, and shares of the softmax that do not sum to 1
    "qwen3_moe with dense layers": (
        Qwen3MoeConfig,
        {
            "moe_intermediate_size": 24,  # transformers multiplies bf16 experts in units of 16 bytes
            "num_experts": 30,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 12,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 12}),
    # sinks that weigh as much as a score, sliding and full layers in turn
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 10,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
        },
    ),
    "phi3": (Phi3Config, {"original_max_position_embeddings": 512}),
    "phi3 with longrope and a sliding window": (
        Phi3Config,
        {
            "original_max_position_embeddings": 128,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0],
                "original_max_position_embeddings": 128,
            },
        },
    ),
    # 14 of 20 channels, so that neither the rotated ones nor the others fill a tile of 8 pairs
    "phi3 with partial rotary": (
        Phi3Config,
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 512,
            **_rope("default", partial_rotary_factor=0.7),
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "olmo2 with llama3 rope": (Olmo2Config, {"num_key_value_heads": 4, **_LLAMA3_ROPE}),
    # three sliding layers to one full, whose rotary embeddings are stretched
    "olmo3": (
        Olmo3Config,
        {
            "num_hidden_layers": 5,
            "sliding_window": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
        },
    ),
    "ministral": (
        MinistralConfig,
        {"head_dim": 6, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    # queries grow three times within the prompt
    "ministral3": (
        Ministral3Config,
        {
            "head_dim": 14,
            **_rope(
                "yarn",
                factor=16.0,
                original_max_position_embeddings=6,
                max_position_embeddings=512,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.4,
            ),
        },
    ),
    # both caps are low, so that scores feel them
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 14,
            "sliding_window": 12,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "granite": (
        GraniteConfig,
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2}),
    "smollm3 with sliding layers": (
        SmolLM3Config,
        {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 12},
    ),
}


def tiny_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    kind, variant = FAMILIES[family]
    return kind(**{**_SIZES, **variant, **overrides})


def tiny_module(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random ``transformers`` model whose biases and norms are no zeros and ones, and whose tokens vary."""
    return randomise(AutoModelForCausalLM.from_config(tiny_config(family, **overrides)), seed).to(dtype).eval()


@torch.no_grad()
def randomise(module: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """New weights for a module: matrices that keep the scale of what passes through, biases and norms that count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            # a tied token would be its own best successor if the residual stream were mostly its embedding
            parameter.copy_(noise * (0.02 if getattr(module.config, "tie_word_embeddings", False) else 1.0))
        else:
            inputs = parameter.shape[-1] if "experts" in name else parameter.numel() / len(parameter)
            parameter.copy_(noise / inputs**0.5)
    return module


def tiny_engine(family: str = "llama", *, module: PreTrainedModel | Path | None = None, **options: Any) -> Engine:
    """An engine on a module of its own or a checkpoint. Options of ``from_pretrained``; the cache holds 96 positions,
    unless told."""
    return Engine.from_pretrained(module or tiny_module(family), **{"max_seq_len": 96, "num_threads": 1, **options})


def random_prompt(tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, tokens).tolist()


@torch.inference_mode()
def stock_tokens(module: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """What ``transformers`` decodes greedily."""
    ids = torch.tensor([list(prompt)])
    output = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token ``n`` is byte ``n``, so that a character may span tokens; <s> in front of every text."""
    alphabet = _byte_alphabet()
    backend = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _byte_alphabet() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where printable, else one above 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def own_rows(engine: Engine) -> OwnRows:
    """The rows of an engine that serves one test only, until the test ends."""
    return _rows_by_hand.enter_context(engine.loop.own_rows())


def release_rows() -> None:
    _rows_by_hand.close()


_rows_by_hand = ExitStack()
