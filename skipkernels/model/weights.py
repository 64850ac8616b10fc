"""ModelWeights: Hugging Face's parameters, packed for decoding.

q/k/v and gate/up are stacked into one matrix each. A loaded module shares its storage: its parameters become views
of the packed matrices, so memory is not doubled.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass
class LayerWeights:
    """One decoder layer. Matrices are [out, in] in the model's dtype; norms and biases are fp32."""

    input_layernorm: torch.Tensor  # [hidden]
    qkv_proj: torch.Tensor  # [(heads + 2 kv_heads) head_dim, hidden]
    qkv_bias: torch.Tensor | None  # [(heads + 2 kv_heads) head_dim]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    o_proj: torch.Tensor  # [hidden, heads head_dim]
    o_proj_bias: torch.Tensor | None  # [hidden]
    post_attention_layernorm: torch.Tensor  # [hidden]
    gate_up_proj: torch.Tensor  # [2 intermediate, hidden]
    down_proj: torch.Tensor  # [hidden, intermediate]


@dataclass
class ModelWeights:
    """All weights of a decoder and its rotary tables for ``max_seq_len`` positions."""

    embed_tokens: torch.Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden], fp32
    lm_head: torch.Tensor  # [vocab, hidden]; the same storage as embed_tokens where tied
    rope_cos: torch.Tensor  # [max_seq_len, head_dim / 2], fp32
    rope_sin: torch.Tensor  # [max_seq_len, head_dim / 2], fp32

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every distinct tensor with a readable name."""
        yield "embed_tokens", self.embed_tokens
        for index, layer in enumerate(self.layers):
            for item in fields(layer):
                if (tensor := getattr(layer, item.name)) is not None:
                    yield f"layers.{index}.{item.name}", tensor
        yield "norm", self.norm
        if self.lm_head is not self.embed_tokens:
            yield "lm_head", self.lm_head

    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def fingerprint(self, config: ModelConfig) -> str:
        """Binds a policy file to a model: a hash over the architecture and the first and last norm in bf16, so that
        the same checkpoint has the same fingerprint in every dtype."""
        digest = hashlib.sha256(config.architecture_hash().encode())
        for norm in (self.layers[0].input_layernorm, self.norm):
            digest.update(norm.bfloat16().view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def expected_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's parameter names of the model and their shapes."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.attention_size, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            shapes[f"{attention}{name}.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{attention}{name}.bias"] = (size,)
        if config.qk_norm:
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (head_dim,)
        shapes[attention + "o_proj.weight"] = (hidden, q_size)
        if config.o_proj_bias:
            shapes[attention + "o_proj.bias"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (
            config.intermediate_size,
            hidden,
        )
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, config.intermediate_size)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def allocate_weights(
    config: ModelConfig, dtype: torch.dtype, max_seq_len: int, device: torch.device | str = "cpu"
) -> ModelWeights:
    """Packed weights with nothing in them yet; on a CPU on huge pages, where the system grants them."""

    def matrix(*shape: int) -> torch.Tensor:
        from skipkernels import _C

        tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor.device.type == "cpu":
            # 2 MB pages: a decode streams gigabytes, and 4 KB pages cost it a TLB miss every other row
            _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def vector(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    hidden, c = config.hidden_size, config
    embed_tokens = matrix(c.vocab_size, hidden)
    return ModelWeights(
        embed_tokens=embed_tokens,
        layers=[
            LayerWeights(
                input_layernorm=vector(hidden),
                qkv_proj=matrix(c.qkv_size, hidden),
                qkv_bias=vector(c.qkv_size) if c.qkv_bias else None,
                q_norm=vector(c.head_dim) if c.qk_norm else None,
                k_norm=vector(c.head_dim) if c.qk_norm else None,
                o_proj=matrix(hidden, c.attention_size),
                o_proj_bias=vector(hidden) if c.o_proj_bias else None,
                post_attention_layernorm=vector(hidden),
                gate_up_proj=matrix(2 * c.intermediate_size, hidden),
                down_proj=matrix(hidden, c.intermediate_size),
            )
            for _ in range(c.num_hidden_layers)
        ],
        norm=vector(hidden),
        lm_head=embed_tokens if c.tie_word_embeddings else matrix(c.vocab_size, hidden),
        rope_cos=vector(max_seq_len, c.head_dim // 2),
        rope_sin=vector(max_seq_len, c.head_dim // 2),
    )


def parameter_views(config: ModelConfig, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Maps every Hugging Face parameter name to its place in the packed weights."""
    q_size, kv_size = config.attention_size, config.num_key_value_heads * config.head_dim
    views = {"model.embed_tokens.weight": weights.embed_tokens, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        views["lm_head.weight"] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        named = {
            prefix + "input_layernorm.weight": layer.input_layernorm,
            prefix + "post_attention_layernorm.weight": layer.post_attention_layernorm,
            attention + "o_proj.weight": layer.o_proj,
            attention + "o_proj.bias": layer.o_proj_bias,
            attention + "q_norm.weight": layer.q_norm,
            attention + "k_norm.weight": layer.k_norm,
            prefix + "mlp.down_proj.weight": layer.down_proj,
        }
        for kind, packed in (("weight", layer.qkv_proj), ("bias", layer.qkv_bias)):
            parts = packed.split([q_size, kv_size, kv_size]) if packed is not None else (None, None, None)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                named[f"{attention}{name}.{kind}"] = part
        gate, up = layer.gate_up_proj.chunk(2)
        named[prefix + "mlp.gate_proj.weight"], named[prefix + "mlp.up_proj.weight"] = gate, up
        views.update({name: view for name, view in named.items() if view is not None})
    return views


def fill_rope(weights: ModelWeights, hf_config: PreTrainedConfig) -> None:
    """Rotary tables by transformers' own embedding, which knows every scaling rule."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions, half = weights.rope_cos.shape
    cos, sin = LlamaRotaryEmbedding(cast("LlamaConfig", hf_config))(
        torch.empty(1, dtype=torch.float32), torch.arange(positions)[None]
    )
    weights.rope_cos.copy_(cos[0, :, :half])
    weights.rope_sin.copy_(sin[0, :, :half])


def load_checkpoint(
    path: Path, config: ModelConfig, dtype: torch.dtype, max_seq_len: int, device: torch.device | str = "cpu"
) -> ModelWeights:
    """Reads (sharded) safetensors into packed weights. Peak memory is the weights and one layer's file pages.

    Raises:
        ModelError: a shard is missing or truncated, a tensor is missing or has the wrong shape. Everything is checked
            against the files' headers before the first byte of weights is read.
    """
    shard_of = _locate(path)
    shapes = expected_parameters(config)
    by_shard: dict[Path, list[str]] = {}
    for name in shapes:
        if name not in shard_of:
            raise ModelError(f"{path}: tensor {name!r} is missing from the checkpoint")
        by_shard.setdefault(shard_of[name], []).append(name)
    for shard, names in by_shard.items():
        with _open_shard(shard) as file:
            held = set(file.keys())
            for name in names:
                if name not in held:
                    raise ModelError(f"{shard}: tensor {name!r} is missing, although the index places it here")
                actual = tuple(file.get_slice(name).get_shape())
                if actual != shapes[name]:
                    raise ModelError(f"{shard}: tensor {name!r} has shape {actual}, expected {shapes[name]}")
    weights = allocate_weights(config, dtype, max_seq_len, device)
    views = parameter_views(config, weights)
    for shard, names in by_shard.items():
        # reopened every few tensors: closing drops the mapped pages, which would double the resident size
        for start in range(0, len(names), 8):
            with _open_shard(shard) as file:
                for name in names[start : start + 8]:
                    views[name].copy_(file.get_tensor(name))
    warn_of_nan(views)
    return weights


def _locate(path: Path) -> dict[str, Path]:
    """Which file holds which tensor, by the index or the single file's header."""
    index = path / INDEX_FILE
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: not a readable safetensors index ({error})") from error
        for shard in sorted(set(weight_map.values())):
            if not (path / shard).exists():
                raise ModelError(f"{path}: shard {shard} is missing; the index names it")
        return {name: path / shard for name, shard in weight_map.items()}
    single = path / SINGLE_FILE
    if not single.exists():
        raise ModelError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read")
    with _open_shard(single) as file:
        return dict.fromkeys(file.keys(), single)


def _open_shard(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read, probably truncated or no safetensors file ({error})") from error


def pack_module(
    module: PreTrainedModel,
    config: ModelConfig,
    dtype: torch.dtype | None,
    max_seq_len: int,
    device: torch.device | str = "cpu",
) -> ModelWeights:
    """Packs a loaded module layer by layer and turns its parameters into views of the packed weights. Of a multimodal
    module its text decoder is packed.

    Norms and biases are copied to fp32; matrices move. With another ``dtype`` than the module's the module is left
    alone, since views cannot change dtype.
    """
    parameters = {f"model.{name}": parameter for name, parameter in module.get_decoder().named_parameters()}
    parameters["lm_head.weight"] = _head(module).weight
    for name, shape in expected_parameters(config).items():
        if name not in parameters:
            raise ModelError(f"{type(module).__name__}: parameter {name!r} is missing")
        if tuple(parameters[name].shape) != shape:
            raise ModelError(f"{name!r} has shape {tuple(parameters[name].shape)}, expected {shape}")
        if parameters[name].device.type != torch.device(device).type:
            raise ModelError(f"{name!r} is on {parameters[name].device}; move the module to {device} first")
    own = parameters["model.embed_tokens.weight"].dtype
    weights = allocate_weights(config, dtype or own, max_seq_len, device)
    views = parameter_views(config, weights)
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(parameters[name])
            if view.dtype == parameters[name].dtype and view.dim() == 2:
                parameters[name].data = view
    warn_of_nan(views)
    return weights


def shares_embeddings(module: PreTrainedModel) -> bool:
    """Whether the head of a module is its embedding table. What its text decoder's configuration says of that does not
    hold in every multimodal module."""
    return _head(module).weight is module.get_input_embeddings().weight


def _head(module: PreTrainedModel) -> torch.nn.Module:
    head = module.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(module).__name__} has no language-model head; load the module that has one")
    return head


def random_weights(
    config: ModelConfig, dtype: torch.dtype, max_seq_len: int, seed: int = 0, device: torch.device | str = "cpu"
) -> ModelWeights:
    """Weights of the right shapes and scale, for timing only: one random block, repeated."""
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(1 << 20, generator=generator) * 0.02).to(dtype)
    weights = allocate_weights(config, dtype, max_seq_len, device)
    block = block.to(device)
    for _, tensor in weights.tensors():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
            continue
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])
    return weights


def warn_of_nan(views: dict[str, torch.Tensor]) -> None:
    """Names every tensor that holds NaN or infinity: the model will decode nonsense, and the user should know why."""
    for name, tensor in views.items():
        # a sum is NaN or infinite when an element is, and allocates nothing
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            logger.warning("%s holds NaN or infinite values; decoding with it gives nonsense", name)
