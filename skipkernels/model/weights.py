"""ModelWeights: Hugging Face's parameters, packed for decoding.

q/k/v and gate/up are stacked into one matrix each. A loaded module shares its storage: its parameters become views
of the packed matrices, so memory is not doubled.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import torch

from skipkernels.errors import DeviceError, ModelError
from skipkernels.model.config import ModelConfig, dtype_name, rope_by_kind
from skipkernels.model.family import FAMILIES, family_of
from skipkernels.model.matrix import FLOAT_FORMATS, AnyMatrix, Matrix, StackedMatrix, float_tensor, formats_of
from skipkernels.model.module_check import check_module
from skipkernels.model.shards import Shards
from skipkernels.skipping.fingerprint import WeightsHash, fingerprint

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass
class LayerWeights:
    """One decoder layer. Matrices are [out, in], each in a format of its own; norms and biases are fp32."""

    input_layernorm: torch.Tensor  # [hidden]
    qkv_proj: AnyMatrix  # [(heads + 2 kv_heads) head_dim, hidden]
    qkv_bias: torch.Tensor | None  # [(heads + 2 kv_heads) head_dim]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    o_proj: AnyMatrix  # [hidden, heads head_dim]
    o_proj_bias: torch.Tensor | None  # [hidden]
    post_attention_layernorm: torch.Tensor  # [hidden], in front of the FFN; Gemma's pre_feedforward_layernorm
    gate_up_proj: AnyMatrix  # [2 intermediate, hidden]; of experts one below the other
    down_proj: AnyMatrix  # [hidden, intermediate]; with neuron_rows a view of storage that lies transposed; of experts
    # one below the other
    attention_branch_norm: torch.Tensor | None = None  # [hidden], of what attention adds to the residual stream
    ffn_branch_norm: torch.Tensor | None = None  # [hidden], of what the FFN adds
    router: AnyMatrix | None = None  # [experts, hidden], where the layer has experts


@dataclass
class ModelWeights:
    """All weights of a decoder and its rotary tables for ``max_seq_len`` positions."""

    embed_tokens: AnyMatrix  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden], fp32
    lm_head: AnyMatrix  # [vocab, hidden]; the same storage as embed_tokens where tied
    rope_cos: torch.Tensor  # [max_seq_len, head_dim / 2], fp32
    rope_sin: torch.Tensor  # [max_seq_len, head_dim / 2], fp32
    neuron_rows: bool = False  # down_proj lies transposed, one neuron a row, so that single neurons can be left out
    second_rope_cos: torch.Tensor | None = None  # of the config's second_rope_layers
    second_rope_sin: torch.Tensor | None = None
    contents: str = ""  # a hash over the values they were loaded with; none: random ones
    experts_per_token: int = 0  # that a router chooses
    cache_dtype: torch.dtype = torch.bfloat16  # of the KV cache, where embed_tokens is quantised

    @property
    def dtype(self) -> torch.dtype:
        """The floats that go with the weights: those of the KV cache."""
        return self.embed_tokens.dtype if isinstance(self.embed_tokens, torch.Tensor) else self.cache_dtype

    @property
    def formats(self) -> str:
        """What the matrices hold: a dtype ("bf16"), or the formats of a quantised file ("q4_1+q8_0")."""
        matrices = [self.embed_tokens, self.lm_head]
        for layer in self.layers:
            matrices += [layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj]
            matrices += [] if layer.router is None else [layer.router]
        found = {name for matrix in matrices for name in formats_of(matrix)}
        return "+".join(sorted(dtype_name(FLOAT_FORMATS[name]) if name in FLOAT_FORMATS else name for name in found))

    def rope_of(self, config: ModelConfig, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a layer."""
        if config.second_rope_layers and config.second_rope_layers[layer]:
            return cast("torch.Tensor", self.second_rope_cos), cast("torch.Tensor", self.second_rope_sin)
        return self.rope_cos, self.rope_sin

    def tensors(self) -> Iterator[tuple[str, AnyMatrix]]:
        """Every distinct tensor or matrix of blocks with a readable name."""
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

    def ffn_nbytes(self) -> float:
        """Bytes of one layer's FFN matrices that a token reads, as they are stored, in the mean over layers."""
        nbytes = 0.0
        for layer in self.layers:
            matrices = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
            if layer.router is None:
                nbytes += matrices
            else:
                nbytes += layer.router.nbytes + matrices * self.experts_per_token / layer.router.shape[0]
        return nbytes / len(self.layers)

    def decode_nbytes(self) -> float:
        """Bytes of matrices one dense decode step reads as they are stored: every layer, lm_head, one embedding row."""
        attention = sum(layer.qkv_proj.nbytes + layer.o_proj.nbytes for layer in self.layers)
        row = self.embed_tokens.nbytes / self.embed_tokens.shape[0]
        return attention + len(self.layers) * self.ffn_nbytes() + self.lm_head.nbytes + row

    def fingerprint(self, config: ModelConfig) -> str:
        """Binds a policy file to a model: the same checkpoint has the same one in every dtype."""
        return fingerprint(config.architecture_hash(), (self.layers[0].input_layernorm, self.norm), self.contents)


def interleave(weights: ModelWeights, num_threads: int = 1) -> None:
    """Replaces every matrix of blocks by its interleaved copy, which the C++ kernels read; one at a time, so that its
    source can go. A tied lm_head stays the same matrix as embed_tokens."""
    tied = weights.lm_head is weights.embed_tokens
    for layer in weights.layers:
        for item in fields(layer):
            matrix = getattr(layer, item.name)
            if isinstance(matrix, Matrix | StackedMatrix):
                setattr(layer, item.name, matrix.interleaved(num_threads))
    if isinstance(weights.embed_tokens, Matrix | StackedMatrix):
        weights.embed_tokens = weights.embed_tokens.interleaved(num_threads)
    if tied:
        weights.lm_head = weights.embed_tokens
    elif isinstance(weights.lm_head, Matrix | StackedMatrix):
        weights.lm_head = weights.lm_head.interleaved(num_threads)


def expected_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's parameter names of the model and their shapes."""
    shapes_only = allocate_weights(config, torch.float32, 1, "meta")
    return {name: tuple(view.shape) for name, view in parameter_views(config, shapes_only).items()}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names of ``expected_parameters`` in files, and their shapes."""
    shapes_only = allocate_weights(config, torch.float32, 1, "meta")
    return {name: tuple(view.shape) for name, view in saved_views(config, shapes_only).items()}


def empty_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A matrix with nothing in it yet; on a CPU on huge pages, where the system grants them."""
    from skipkernels import _C

    tensor = torch.empty(rows, columns, dtype=dtype, device=device)
    if tensor.device.type == "cpu":
        # 2 MB pages: a decode streams gigabytes, and 4 KB pages cost it a TLB miss every other row
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def allocate_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    max_seq_len: int,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
    *,
    vectors_only: bool = False,
) -> ModelWeights:
    """Packed weights with nothing in them yet; on a CPU on huge pages, where the system grants them.

    ``neuron_rows``: down_proj lies transposed, see ``ModelWeights.neuron_rows``. With ``vectors_only`` matrices have
    their shapes and no memory.
    """

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return empty_matrix(rows, columns, dtype, "meta" if vectors_only else device)

    def vector(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def rotary_table() -> torch.Tensor:
        try:
            return vector(max_seq_len, c.head_dim // 2)
        except RuntimeError as error:  # what torch's allocators raise
            raise DeviceError(f"no memory for max_seq_len={max_seq_len} ({str(error).splitlines()[0]})") from error

    def layer(index: int) -> LayerWeights:
        experts = c.num_experts if c.has_experts(index) else 0
        size, copies = (c.moe_intermediate_size, experts) if experts else (c.intermediate_size, 1)
        return LayerWeights(
            input_layernorm=vector(hidden),
            qkv_proj=matrix(c.qkv_size, hidden),
            qkv_bias=vector(c.qkv_size) if c.qkv_bias else None,
            q_norm=vector(c.head_dim) if c.qk_norm else None,
            k_norm=vector(c.head_dim) if c.qk_norm else None,
            o_proj=matrix(hidden, c.attention_size),
            o_proj_bias=vector(hidden) if c.o_proj_bias else None,
            post_attention_layernorm=vector(hidden),
            gate_up_proj=matrix(copies * 2 * size, hidden),
            down_proj=matrix(size, hidden).T if neuron_rows else matrix(copies * hidden, size),
            attention_branch_norm=vector(hidden) if c.branch_norms else None,
            ffn_branch_norm=vector(hidden) if c.branch_norms else None,
            router=matrix(experts, hidden) if experts else None,
        )

    hidden, c = config.hidden_size, config
    embed_tokens = matrix(c.vocab_size, hidden)
    return ModelWeights(
        embed_tokens=embed_tokens,
        layers=[layer(index) for index in range(c.num_hidden_layers)],
        norm=vector(hidden),
        lm_head=embed_tokens if c.tie_word_embeddings else matrix(c.vocab_size, hidden),
        rope_cos=rotary_table(),
        rope_sin=rotary_table(),
        second_rope_cos=rotary_table() if c.second_rope_layers else None,
        second_rope_sin=rotary_table() if c.second_rope_layers else None,
        neuron_rows=neuron_rows,
        experts_per_token=c.num_experts_per_tok,
    )


def parameter_views(config: ModelConfig, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Maps every Hugging Face parameter name to its place in the packed weights.

    Raises:
        ModelError: a matrix is quantised.
    """
    family = FAMILIES.get(config.model_type)
    fused = family is not None and family.fused
    views = {"model.embed_tokens.weight": float_tensor(weights.embed_tokens), "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        views["lm_head.weight"] = float_tensor(weights.lm_head)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        named = {
            prefix + "input_layernorm.weight": layer.input_layernorm,
            attention + "o_proj.weight": float_tensor(layer.o_proj),
            attention + "o_proj.bias": layer.o_proj_bias,
            attention + "q_norm.weight": layer.q_norm,
            attention + "k_norm.weight": layer.k_norm,
        }
        if config.branch_norms:
            named[prefix + "post_attention_layernorm.weight"] = layer.attention_branch_norm
            named[prefix + "pre_feedforward_layernorm.weight"] = layer.post_attention_layernorm
            named[prefix + "post_feedforward_layernorm.weight"] = layer.ffn_branch_norm
        else:
            named[prefix + "post_attention_layernorm.weight"] = layer.post_attention_layernorm
        named |= _qkv_views(config, attention, layer, fused)
        named |= _ffn_views(prefix + "mlp.", layer, fused)
        views.update({name: view for name, view in named.items() if view is not None})
    return views


def _qkv_views(config: ModelConfig, prefix: str, layer: LayerWeights, fused: bool) -> dict[str, torch.Tensor | None]:
    if fused:
        return {prefix + "qkv_proj.weight": float_tensor(layer.qkv_proj)}
    q_size, kv_size = config.attention_size, config.num_key_value_heads * config.head_dim
    views: dict[str, torch.Tensor | None] = {}
    for kind, packed in (("weight", float_tensor(layer.qkv_proj)), ("bias", layer.qkv_bias)):
        parts = packed.split([q_size, kv_size, kv_size]) if packed is not None else (None, None, None)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            views[f"{prefix}{name}.{kind}"] = part
    return views


def _ffn_views(prefix: str, layer: LayerWeights, fused: bool) -> dict[str, torch.Tensor]:
    gate_up, down = float_tensor(layer.gate_up_proj), float_tensor(layer.down_proj)
    if fused:
        return {prefix + "gate_up_proj.weight": gate_up, prefix + "down_proj.weight": down}
    if layer.router is None:
        gate, up = gate_up.chunk(2)
        return {prefix + "gate_proj.weight": gate, prefix + "up_proj.weight": up, prefix + "down_proj.weight": down}
    experts = layer.router.shape[0]
    return {
        prefix + "gate.weight": float_tensor(layer.router),
        prefix + "experts.gate_up_proj": gate_up.view(experts, -1, gate_up.shape[1]),
        prefix + "experts.down_proj": down.view(experts, -1, down.shape[1]),
    }


def as_saved(config: ModelConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What files hold of a parameter: of experts, which a module stacks, each one's matrices, under other names."""
    family = FAMILIES.get(config.model_type)
    experts = family.experts if family else None
    if experts is None or ".mlp." not in name:
        return {name: tensor}
    prefix, _, part = name.partition("mlp.")
    if part == "gate.weight":
        return {prefix + experts.saved_router: tensor}
    if part == "experts.down_proj":
        return {prefix + experts.saved_down.format(index): matrix for index, matrix in enumerate(tensor)}
    if part != "experts.gate_up_proj":
        return {name: tensor}  # of a dense layer
    saved = {}
    for index, matrix in enumerate(tensor):
        gate, up = matrix.chunk(2)
        saved[prefix + experts.saved_gate.format(index)] = gate
        saved[prefix + experts.saved_up.format(index)] = up
    return saved


def saved_views(config: ModelConfig, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """``parameter_views`` by the names in files."""
    views: dict[str, torch.Tensor] = {}
    for name, view in parameter_views(config, weights).items():
        views |= as_saved(config, name, view)
    return views


def as_packed(config: ModelConfig, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter as the packed weights hold them: what a family does to its norms is done once. A factor
    of the logits goes into the final norm."""
    if name.endswith("norm.weight") and config.norm_offset:
        parameter = parameter.float() + config.norm_offset
    if name == "model.norm.weight" and config.logits_multiplier != 1.0:
        parameter = parameter.float() * config.logits_multiplier
    return parameter


def fill_rope(
    weights: ModelWeights,
    hf_config: PreTrainedConfig,
    module: PreTrainedModel | None = None,
    frequency_factors: torch.Tensor | None = None,
) -> None:
    """Rotary tables by transformers' own embedding, which knows every scaling rule; with the frequencies of a loaded
    ``module``, which was perhaps cast to another dtype as a whole, or divided by ``frequency_factors``
    [head_dim / 2], which a GGUF file holds."""
    tables = rope_tables(hf_config, len(weights.rope_cos), module, frequency_factors)
    pairs = [(weights.rope_cos, weights.rope_sin), (weights.second_rope_cos, weights.second_rope_sin)]
    for (own_cos, own_sin), (cos, sin) in zip(pairs, tables, strict=False):
        if own_cos is not None and own_sin is not None:
            own_cos.copy_(cos)
            own_sin.copy_(sin)


def rope_tables(
    hf_config: PreTrainedConfig,
    positions: int,
    module: PreTrainedModel | None = None,
    frequency_factors: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines [positions, head_dim / 2], fp32, of most layers and then those of the second_rope_layers."""
    family = family_of(hf_config)
    tables = [
        _rope_table(hf_config, kind, rope, positions, module, frequency_factors)
        for kind, rope in rope_by_kind(hf_config, family).items()
    ]
    if family.layers_without_rope:
        tables.append((torch.ones_like(tables[0][0]), torch.zeros_like(tables[0][1])))  # an angle of 0 everywhere
    return tables


def _rope_table(
    hf_config: PreTrainedConfig,
    kind: str | None,
    rope: dict[str, object],
    positions: int,
    module: PreTrainedModel | None,
    frequency_factors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        with torch.inference_mode(False), torch.no_grad():
            of_kind = copy.copy(hf_config)
            of_kind.rope_parameters = rope
            rotary = LlamaRotaryEmbedding(cast("LlamaConfig", of_kind))
            own = None if module is None else module.get_decoder().rotary_emb
            prefix = f"{kind}_" if kind else ""
            if own is not None and (kind is None or hasattr(own, prefix + "inv_freq")):  # else no layer is of the kind
                rotary.inv_freq = getattr(own, prefix + "inv_freq").detach().cpu().clone()
                rotary.attention_scaling = getattr(own, prefix + "attention_scaling")
            if frequency_factors is not None:
                rotary.register_buffer("inv_freq", cast(torch.Tensor, rotary.inv_freq) / frequency_factors)
            cos, sin = rotary(torch.empty(1, dtype=torch.float32), torch.arange(positions)[None])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"rotary parameters {rope} cannot be used ({error})") from error
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def load_checkpoint(
    shards: Shards,
    config: ModelConfig,
    dtype: torch.dtype,
    max_seq_len: int,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
) -> ModelWeights:
    """Reads safetensors into packed weights. Peak memory is the weights and one layer's file pages.

    Raises:
        ModelError: a shard is missing or truncated, a tensor is missing, has the wrong shape or dtype, or is not
            understood. Everything is checked against the files' headers before the first byte of weights is read.
    """
    shards.check(expected_tensors(config), config.num_hidden_layers)
    weights, contents = allocate_weights(config, dtype, max_seq_len, device, neuron_rows), WeightsHash()
    views = saved_views(config, weights)
    for name, tensor in shards.tensors(views):
        views[name].copy_(as_packed(config, name, tensor))
        contents.add(name, tensor)
    warn_of_nan(views)
    weights.contents = contents.hexdigest()
    return weights


def pack_module(
    module: PreTrainedModel,
    config: ModelConfig,
    dtype: torch.dtype | None,
    max_seq_len: int,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
) -> ModelWeights:
    """Packs a loaded module layer by layer and turns its parameters into views of the packed weights. Of a multimodal
    module its text decoder is packed.

    Norms and biases are copied to fp32; matrices move. With another ``dtype`` than the module's the module is left
    alone, since views cannot change dtype.
    """
    parameters = check_module(module, config, expected_parameters(config), device)
    own = parameters["model.embed_tokens.weight"].dtype
    contents = WeightsHash()
    with torch.inference_mode(False), torch.no_grad():  # else the module could not be trained or used outside
        weights = allocate_weights(config, dtype or own, max_seq_len, device, neuron_rows)
        views = parameter_views(config, weights)
        for name, view in views.items():
            for saved, tensor in as_saved(config, name, parameters[name]).items():
                contents.add(saved, tensor)
            view.copy_(as_packed(config, name, parameters[name]))
            shared = view.dtype == parameters[name].dtype and view.dim() >= 2
            if shared and not parameters[name].is_inference():  # one made in inference mode cannot change its storage
                parameters[name].data = view
    warn_of_nan(views)
    weights.contents = contents.hexdigest()
    return weights


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    max_seq_len: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
) -> ModelWeights:
    """Weights of the right shapes and scale, for timing only: one random block, repeated."""
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(1 << 20, generator=generator) * 0.02).to(dtype)
    weights = allocate_weights(config, dtype, max_seq_len, device, neuron_rows)
    block = block.to(device)
    for _, matrix in weights.tensors():
        tensor = float_tensor(matrix)
        if tensor.dim() == 1:
            tensor.fill_(1.0)
            continue
        flat = (tensor if tensor.is_contiguous() else tensor.T).view(-1)
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
