"""From a GGUF file's metadata to Hugging Face's configuration, so that every irregularity stays in ``ModelConfig``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels.errors import ModelError
from skipkernels.model.gguf_file import GgufFile, Value

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

FAMILY_OF = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "qwen3moe": "qwen3_moe",
}
"""GGUF's name of an architecture -> Hugging Face's of the family. Mistral's and Mixtral's files call themselves llama,
and those of OLMo 3 olmo2."""
EMBEDDINGS, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_END_TEXTS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)
"""Control tokens that end an answer wherever they come, as in llama.cpp: a file names one end, chats have several."""
_CONTROL = 3


def hf_config(file: GgufFile) -> PreTrainedConfig:
    """
    Raises:
        ModelError: the architecture is not supported, or metadata is missing or of the wrong kind.
    """
    from transformers import AutoConfig

    values = _Values(file)
    architecture = values.architecture
    heads = values.integer("attention.head_count")
    hidden_size = values.integer("embedding_length")
    embeddings = file.tensors.get(EMBEDDINGS)
    if embeddings is None:
        raise ModelError(f"{file.path}: tensor {EMBEDDINGS!r} is missing")
    head_dim = values.integer("attention.key_length", hidden_size // max(heads, 1))
    if (value_dim := values.integer("attention.value_length", head_dim)) != head_dim:
        raise ModelError(f"{file.path}: keys of {head_dim} and values of {value_dim} channels are not supported")
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": values.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embeddings.shape[0],  # padded, perhaps: more than the tokenizer has
        "max_position_embeddings": values.integer("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in file.tensors,
        "rope_parameters": _rope_parameters(values, head_dim),
        "bos_token_id": values.token("bos"),
        "eos_token_id": end_tokens(file),
        "pad_token_id": values.token("padding"),
    }
    if architecture in ("llama", "qwen3", "qwen3moe"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    family = FAMILY_OF[architecture]
    if architecture == "gemma2":
        settings |= _of_gemma2(values, settings)
    if architecture == "gemma3":
        settings |= _of_gemma3(values, settings)
    if architecture == "olmo2" and values.get("attention.sliding_window"):
        family, settings = "olmo3", settings | _of_olmo3(values, settings)
    if values.integer("expert_count", 0):
        if architecture not in _EXPERTS_OF:
            raise ModelError(f"{file.path}: {architecture} with experts is not supported")
        family, settings = _EXPERTS_OF[architecture], settings | _of_experts(values)
    return AutoConfig.for_model(family, **settings)


_EXPERTS_OF = {"llama": "mixtral", "qwen3moe": "qwen3_moe"}
_GEMMA2_PERIOD, _GEMMA2_27B_LAYERS = 2, 46
_OLMO3_PERIOD = 4
_GEMMA3_PERIOD, _GEMMA3_SLIDING_THETA, _GEMMA3_27B_LAYERS = 6, 10_000.0, 62


def _of_gemma2(values: _Values, settings: dict[str, Any]) -> dict[str, object]:
    """As ``_of_gemma3``; every second layer slides, and 27B has 46 layers."""
    by_heads = settings["num_hidden_layers"] == _GEMMA2_27B_LAYERS
    heads_dim = settings["hidden_size"] // settings["num_attention_heads"]
    return {
        "layer_types": _layer_types(values, settings["num_hidden_layers"], _GEMMA2_PERIOD),
        "sliding_window": values.integer("attention.sliding_window"),
        "query_pre_attn_scalar": heads_dim if by_heads else settings["head_dim"],
        "attn_logit_softcapping": values.number("attn_logit_softcapping"),
        "final_logit_softcapping": values.number("final_logit_softcapping"),
    }


def _of_experts(values: _Values) -> dict[str, object]:
    """Chosen experts' shares sum to 1, as in llama.cpp."""
    return {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length", values.integer("feed_forward_length")),
        "norm_topk_prob": True,
    }


def _of_olmo3(values: _Values, settings: dict[str, Any]) -> dict[str, object]:
    """What makes a file of OLMo 2's architecture one of OLMo 3; rotary scaling is that of the full layers."""
    sliding = {"rope_type": "default", "rope_theta": settings["rope_parameters"]["rope_theta"]}
    return {
        "layer_types": _layer_types(values, settings["num_hidden_layers"], _OLMO3_PERIOD),
        "sliding_window": values.integer("attention.sliding_window"),
        "rope_parameters": {"full_attention": settings["rope_parameters"], "sliding_attention": sliding},
    }


def _of_gemma3(values: _Values, settings: dict[str, Any]) -> dict[str, object]:
    """What files of Gemma 3 leave out, as llama.cpp completes it. Scores are scaled by the size of a head, in the model
    of 62 layers (27B) alone by hidden_size / num_attention_heads; rotary scaling is that of the full layers."""
    by_heads = settings["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    heads_dim = settings["hidden_size"] // settings["num_attention_heads"]
    sliding = {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", _GEMMA3_SLIDING_THETA)}
    return {
        "layer_types": _layer_types(values, settings["num_hidden_layers"], _GEMMA3_PERIOD),
        "sliding_window": values.integer("attention.sliding_window"),
        "rope_parameters": {"full_attention": settings["rope_parameters"], "sliding_attention": sliding},
        "query_pre_attn_scalar": heads_dim if by_heads else settings["head_dim"],
        "attn_logit_softcapping": values.get("attn_logit_softcapping"),
        "final_logit_softcapping": values.get("final_logit_softcapping"),
    }


def _layer_types(values: _Values, layers: int, usual_period: int) -> list[str]:
    """The last layer of each period attends to everything; files name the period, or say of each layer whether it
    slides."""
    pattern = values.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        period = values.integer("attention.sliding_window_pattern", usual_period)
        pattern = [period < 1 or (layer + 1) % period != 0 for layer in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def generation_config(file: GgufFile) -> GenerationConfig:
    """Where answers begin and end, as the file says; sampling is not in it."""
    from transformers import GenerationConfig

    values = _Values(file)
    return GenerationConfig(
        bos_token_id=values.token("bos"), eos_token_id=end_tokens(file), pad_token_id=values.token("padding")
    )


def end_tokens(file: GgufFile) -> list[int] | None:
    """Every token that ends an answer, the file's own end-of-sequence token first; None where there is none."""
    values = _Values(file)
    named = [values.token(name) for name in ("eos", "eot", "eom")]
    tokens, kinds = file.metadata.get("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list):
        pairs = enumerate(zip(tokens, kinds, strict=False))
        named += [index for index, (text, kind) in pairs if kind == _CONTROL and text in _END_TEXTS]
    return list(dict.fromkeys(token for token in named if token is not None)) or None


class _Values:
    """Metadata of the file's architecture, with its kind checked."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        found = file.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise ModelError(f"{file.path}: general.architecture is missing from its metadata")
        if found not in FAMILY_OF:
            raise ModelError(
                f"{file.path}: architecture {found!r} is not supported; supported are {', '.join(FAMILY_OF)}"
            )
        self.architecture = found

    def get(self, name: str) -> Value | None:
        return self._file.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self._file.path}: {self.architecture}.{name} is missing from its metadata")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self._file.path}: {self.architecture}.{name} must be one number, got {value!r}")
        # files hold 32 bits of 1e-6, which is the nearest number to it there but not here
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int):
            raise ModelError(f"{self._file.path}: {self.architecture}.{name} must be an integer, got {value!r}")
        return value

    def token(self, name: str) -> int | None:
        value = self._file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ModelError(f"{self._file.path}: tokenizer.ggml.{name}_token_id must be an integer, got {value!r}")
        return value


def _rope_parameters(values: _Values, head_dim: int) -> dict[str, object]:
    """llama3's scaling is not among them: files hold its factors, one for each frequency, in ``ROPE_FACTORS``."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)}
    if (width := values.integer("rope.dimension_count", head_dim)) != head_dim:
        rope["partial_rotary_factor"] = width / head_dim
    kind = values.get("rope.scaling.type")
    if kind is None and values.get("rope.scale_linear") is not None:  # its name in the first files
        return rope | {"rope_type": "linear", "factor": values.number("rope.scale_linear")}
    if kind in (None, "none"):
        return rope
    rope |= {"rope_type": kind, "factor": values.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values.integer("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if values.get(f"rope.scaling.yarn_{name}") is not None:
                rope[name] = values.number(f"rope.scaling.yarn_{name}")
    return rope
