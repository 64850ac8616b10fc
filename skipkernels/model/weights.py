"""ModelWeights: Hugging Face's parameters, packed for decoding.

q/k/v and gate/up are stacked into one matrix each. A loaded module shares its storage: its parameters become views
of the packed matrices, so memory is not doubled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from skipkernels.errors import DeviceError
from skipkernels.model.config import ModelConfig, dtype_name
from skipkernels.model.family import FAMILIES, Experts
from skipkernels.model.matrix import (
    FLOAT_FORMATS,
    AnyMatrix,
    Matrix,
    StackedMatrix,
    as_tensor,
    column_nbytes,
    float_tensor,
    formats_of,
    halves,
    merged,
    stacked,
)
from skipkernels.model.module_check import check_module
from skipkernels.model.rope import query_scales, rope_tables
from skipkernels.model.shards import Shards
from skipkernels.skipping.fingerprint import WeightsHash, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass
class LayerWeights:
    """One decoder layer. Matrices are [out, in], each in a format of its own; norms and biases are fp32."""

    input_layernorm: torch.Tensor | None  # [hidden]; None: attention reads the residual stream as it is
    qkv_proj: AnyMatrix  # [(heads + 2 kv_heads) head_dim, hidden]
    qkv_bias: torch.Tensor | None  # [(heads + 2 kv_heads) head_dim]
    q_norm: torch.Tensor | None  # [head_dim], or [heads head_dim] of all heads together
    k_norm: torch.Tensor | None  # [head_dim], or [kv_heads head_dim]
    o_proj: AnyMatrix  # [hidden, heads head_dim]
    o_proj_bias: torch.Tensor | None  # [hidden]
    post_attention_layernorm: torch.Tensor | None  # [hidden], in front of the FFN; Gemma's pre_feedforward_layernorm
    gate_up_proj: AnyMatrix  # [2 intermediate, hidden]; of experts one below the other
    down_proj: AnyMatrix  # [hidden, intermediate]; with neuron_rows floats are a view of transposed storage; of experts
    # one below the other, with neuron_rows side by side (``expert_down_proj``)
    attention_branch_norm: torch.Tensor | None = None  # [hidden], of what attention adds to the residual stream
    ffn_branch_norm: torch.Tensor | None = None  # [hidden], of what the FFN adds
    router: AnyMatrix | None = None  # [experts, hidden], where the layer has experts
    sinks: torch.Tensor | None = None  # [heads], of models whose heads have one more score
    router_bias: torch.Tensor | None = None  # [experts]
    gate_up_bias: torch.Tensor | None = None  # [experts 2 intermediate]
    down_proj_bias: torch.Tensor | None = None  # [experts hidden]

    def neuron_nbytes(self) -> tuple[int, int]:
        """The bytes that are not read where a neuron's row of up_proj, and where its column of down_proj is left
        out."""
        if self.router is not None:  # all experts' gates and ups, and as many columns as ups
            rows = self.gate_up_proj.shape[0]
            return round(self.gate_up_proj.nbytes / rows), round(self.down_proj.nbytes / (rows // 2))
        up = self.gate_up_proj.parts[-1] if isinstance(self.gate_up_proj, StackedMatrix) else self.gate_up_proj
        return round(up.nbytes / up.shape[0]), round(column_nbytes(self.down_proj))

    def expert_nbytes(self) -> float:
        """The bytes of one expert's matrices; 0 without experts."""
        if self.router is None:
            return 0.0
        return (self.gate_up_proj.nbytes + self.down_proj.nbytes) / self.router.shape[0]


_MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "router")


@dataclass
class ModelWeights:
    """All weights of a decoder and its rotary tables for ``max_seq_len`` positions."""

    embed_tokens: AnyMatrix  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden], fp32
    lm_head: AnyMatrix  # [vocab, hidden]; the same storage as embed_tokens where tied
    rope_cos: torch.Tensor  # [max_seq_len, rotary_pairs], fp32
    rope_sin: torch.Tensor  # [max_seq_len, rotary_pairs], fp32
    neuron_rows: bool = False  # down_proj lies one neuron after the other, so that single neurons can be left out
    second_rope_cos: torch.Tensor | None = None  # of the config's second_rope_layers
    second_rope_sin: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None  # [max_seq_len], fp32, of models whose queries grow with their position
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

    def dequantized(self, dtype: torch.dtype | None = None, pause: Callable[[], None] = lambda: None) -> ModelWeights:
        """The same weights with all matrices as floats of ``dtype``, by default their own; those that are share their
        memory. ``pause`` is called before each matrix."""
        wanted = dtype or self.dtype

        def floats(matrix: AnyMatrix) -> torch.Tensor:
            pause()
            return as_tensor(matrix, wanted).to(wanted)

        embed_tokens = floats(self.embed_tokens)
        layers = [
            replace(
                layer, **{name: floats(getattr(layer, name)) for name in _MATRICES if getattr(layer, name) is not None}
            )
            for layer in self.layers
        ]
        tied = self.lm_head is self.embed_tokens
        return replace(
            self, embed_tokens=embed_tokens, layers=layers, lm_head=embed_tokens if tied else floats(self.lm_head)
        )

    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def ffn_nbytes(self) -> float:
        """Bytes of one layer's FFN matrices that a token reads, as they are stored, in the mean over layers."""
        return sum(map(self._ffn_nbytes, self.layers)) / len(self.layers)

    def _ffn_nbytes(self, layer: LayerWeights) -> float:
        if layer.router is None:
            return layer.gate_up_proj.nbytes + layer.down_proj.nbytes
        return layer.router.nbytes + self.experts_per_token * layer.expert_nbytes()

    def layer_nbytes(self) -> float:
        """Bytes of one layer's matrices that a token reads, in the mean over layers."""
        attention = sum(layer.qkv_proj.nbytes + layer.o_proj.nbytes for layer in self.layers)
        return attention / len(self.layers) + self.ffn_nbytes()

    def neuron_shares(self) -> torch.Tensor:
        """The shares of each layer's FFN bytes that all rows of up_proj, and what is single of all columns of
        down_proj, take: f32 [layers, 2], a third each where weights are floats; with experts of those that a token
        reads, a little less, for its router is read whole."""
        shares = []
        for layer in self.layers:
            neurons = layer.down_proj.shape[1]
            if layer.router is not None:
                neurons = layer.gate_up_proj.shape[0] // 2 // layer.router.shape[0] * self.experts_per_token
            shares.append([neurons * each / self._ffn_nbytes(layer) for each in layer.neuron_nbytes()])
        return torch.tensor(shares)

    def no_neurons(self) -> str | None:
        """Why single neurons of these weights cannot be left out, however they are arranged; None: they can."""
        matrices = [
            matrix
            for layer in self.layers
            if layer.router is not None
            for matrix in (layer.gate_up_proj, layer.down_proj)
        ]
        return no_neurons_of_experts({format for matrix in matrices for format in formats_of(matrix)})

    def decode_nbytes(self) -> float:
        """Bytes of matrices one dense decode step reads as they are stored: every layer, lm_head, one embedding row."""
        row = self.embed_tokens.nbytes / self.embed_tokens.shape[0]
        return len(self.layers) * self.layer_nbytes() + self.lm_head.nbytes + row

    def fingerprint(self, config: ModelConfig) -> str:
        """Binds a policy file to a model: the same checkpoint has the same one in every dtype."""
        first = self.layers[0].input_layernorm if config.input_norms else self.layers[0].attention_branch_norm
        return fingerprint(config.architecture_hash(), (cast("torch.Tensor", first), self.norm), self.contents)


def no_neurons_of_experts(formats: Collection[str]) -> str | None:
    """Why single neurons of experts that are held in ``formats`` cannot be left out; None: they can."""
    if not (blocks := sorted(set(formats) - FLOAT_FORMATS.keys())):
        return None
    return (
        f"single neurons of experts in {'+'.join(blocks)} cannot be left out; leave out whole FFN blocks, or load the "
        "model with dtype bf16 (--dtype bf16)"
    )


def interleave(weights: ModelWeights, num_threads: int = 1) -> None:
    """Replaces every matrix of blocks by a copy that the C++ kernels read; one at a time, so that its source can go.
    Rows are interleaved; with ``neuron_rows``, those of up_proj and the columns of down_proj lie in one piece each. A
    tied lm_head stays the same matrix as embed_tokens."""
    tied = weights.lm_head is weights.embed_tokens
    for layer in weights.layers:
        if weights.neuron_rows:
            _arrange_neurons(layer, num_threads)
        for item in fields(layer):
            matrix = getattr(layer, item.name)
            if isinstance(matrix, Matrix | StackedMatrix) and not (weights.neuron_rows and item.name in _OF_NEURONS):
                setattr(layer, item.name, matrix.interleaved(num_threads))
    if isinstance(weights.embed_tokens, Matrix | StackedMatrix):
        weights.embed_tokens = weights.embed_tokens.interleaved(num_threads)
    if tied:
        weights.lm_head = weights.embed_tokens
    elif isinstance(weights.lm_head, Matrix | StackedMatrix):
        weights.lm_head = weights.lm_head.interleaved(num_threads)


def into_planes(weights: ModelWeights) -> None:
    """Replaces every matrix of blocks by a copy that GPU kernels read (``model.planes``), one at a time. Neighbours in
    a stack that share a format become one matrix, and a tied lm_head stays the same matrix as embed_tokens.

    Raises:
        DeviceError: with ``neuron_rows``, where down_proj is one of blocks.
    """

    def planes(matrix: AnyMatrix) -> AnyMatrix:
        if isinstance(matrix, torch.Tensor):
            return matrix
        return stacked([part.arranged("planes") for part in merged(matrix.parts)])

    tied = weights.lm_head is weights.embed_tokens
    for layer in weights.layers:
        if weights.neuron_rows and isinstance(layer.down_proj, Matrix):
            raise DeviceError(NO_COLUMNS_IN_PLANES.format(layer.down_proj.format))
        if weights.neuron_rows and not isinstance(layer.gate_up_proj, torch.Tensor):  # gate and up are read apart
            gate, up = halves(layer.gate_up_proj)
            assert isinstance(gate, Matrix)
            assert isinstance(up, Matrix)
            layer.gate_up_proj = StackedMatrix((gate.arranged("planes"), up.arranged("planes")))
        for name in _MATRICES:
            if (matrix := getattr(layer, name)) is not None and not (weights.neuron_rows and name == "gate_up_proj"):
                setattr(layer, name, planes(matrix))
    weights.embed_tokens = planes(weights.embed_tokens)
    weights.lm_head = weights.embed_tokens if tied else planes(weights.lm_head)


NO_COLUMNS_IN_PLANES = (
    "single neurons of a down_proj in {} cannot be left out on a GPU; leave out whole FFN blocks, load the model with "
    "dtype bf16 (--dtype bf16), or decode on device 'cpu'"
)
_OF_NEURONS = ("gate_up_proj", "down_proj")


def _arrange_neurons(layer: LayerWeights, num_threads: int) -> None:
    """So that single rows of up_proj and single columns of down_proj can be left unread, where they are blocks."""
    if not isinstance(layer.gate_up_proj, torch.Tensor):
        gate, up = halves(layer.gate_up_proj)
        assert isinstance(gate, Matrix)
        assert isinstance(up, Matrix)
        layer.gate_up_proj = StackedMatrix((gate.interleaved(num_threads), up.arranged("single_rows", num_threads)))
    if isinstance(layer.down_proj, Matrix):
        layer.down_proj = layer.down_proj.arranged("single_columns", num_threads)


def expected_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's parameter names of the model and their shapes."""
    shapes_only = allocate_weights(config, torch.float32, 1, "meta")
    shapes = {name: tuple(view.shape) for name, view in parameter_views(config, shapes_only).items()}
    return {
        name: (*shape[:-2], shape[-2] * shape[-1]) if _alternates(config, name) else shape
        for name, shape in shapes.items()
    }


def stacks_experts(config: ModelConfig) -> bool:
    """Whether files hold a layer's experts as a module does, in transposed stacks (``model.stacked_experts``)."""
    family = FAMILIES.get(config.model_type)
    return family is not None and family.experts is not None and family.experts.transposed


def _alternates(config: ModelConfig, name: str) -> bool:
    """Whether a parameter holds gate and up in alternate columns: a view of it has one dimension more, [.., 2]."""
    return stacks_experts(config) and ".experts.gate_up_proj" in name


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names of ``expected_parameters`` in files, and their shapes; of ``stacks_experts`` each expert's matrices."""
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
            return vector(max_seq_len, c.rotary_pairs)
        except RuntimeError as error:  # what torch's allocators raise
            raise DeviceError(f"no memory for max_seq_len={max_seq_len} ({str(error).splitlines()[0]})") from error

    def layer(index: int) -> LayerWeights:
        experts = c.num_experts if c.has_experts(index) else 0
        size, copies = (c.moe_intermediate_size, experts) if experts else (c.intermediate_size, 1)
        return LayerWeights(
            input_layernorm=vector(hidden) if c.input_norms else None,
            qkv_proj=matrix(c.qkv_size, hidden),
            qkv_bias=vector(c.qkv_size) if c.qkv_bias else None,
            q_norm=vector(c.attention_size if c.norms_whole_qk else c.head_dim) if c.qk_norm else None,
            k_norm=vector(kv_size if c.norms_whole_qk else c.head_dim) if c.qk_norm else None,
            o_proj=matrix(hidden, c.attention_size),
            o_proj_bias=vector(hidden) if c.o_proj_bias else None,
            post_attention_layernorm=vector(hidden) if c.input_norms else None,
            gate_up_proj=matrix(copies * 2 * size, hidden),
            down_proj=matrix(copies * size, hidden).T if neuron_rows else matrix(copies * hidden, size),
            attention_branch_norm=vector(hidden) if c.branch_norms else None,
            ffn_branch_norm=vector(hidden) if c.branch_norms else None,
            router=matrix(experts, hidden) if experts else None,
            sinks=vector(c.num_attention_heads) if c.attention_sinks else None,
            router_bias=vector(experts) if c.expert_biases else None,
            gate_up_bias=vector(experts * 2 * size) if c.expert_biases else None,
            down_proj_bias=vector(experts * hidden) if c.expert_biases else None,
        )

    hidden, c, kv_size = config.hidden_size, config, config.num_key_value_heads * config.head_dim
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
        query_scale=vector(max_seq_len) if c.query_scale_beta else None,
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
            attention + "sinks": layer.sinks,
        }
        if config.branch_norms:
            named[prefix + "post_attention_layernorm.weight"] = layer.attention_branch_norm
            named[prefix + "pre_feedforward_layernorm.weight"] = layer.post_attention_layernorm
            named[prefix + "post_feedforward_layernorm.weight"] = layer.ffn_branch_norm
        else:
            named[prefix + "post_attention_layernorm.weight"] = layer.post_attention_layernorm
        named |= _qkv_views(config, attention, layer, fused)
        ffn = _transposed_views if stacks_experts(config) else partial(_ffn_views, fused=fused)
        named |= ffn(prefix + "mlp.", layer)
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


def expert_down_proj(down_proj: torch.Tensor, experts: int, hidden_size: int) -> torch.Tensor:
    """Every expert's matrix, a view [experts, hidden, expert's intermediate] of how they lie in ``LayerWeights``."""
    if down_proj.shape[0] == hidden_size:  # side by side
        return down_proj.unflatten(1, (experts, -1)).transpose(0, 1)
    return down_proj.unflatten(0, (experts, hidden_size))


def _transposed_views(prefix: str, layer: LayerWeights) -> dict[str, torch.Tensor | None]:
    """Of ``stacks_experts``."""
    router, gate_up, down = (
        float_tensor(cast("AnyMatrix", each)) for each in (layer.router, layer.gate_up_proj, layer.down_proj)
    )
    experts = len(router)
    gate_up_bias, down_bias = cast("torch.Tensor", layer.gate_up_bias), cast("torch.Tensor", layer.down_proj_bias)
    return {
        prefix + "router.weight": router,
        prefix + "router.bias": layer.router_bias,
        prefix + "experts.gate_up_proj": gate_up.view(experts, 2, -1, gate_up.shape[1]).permute(0, 3, 2, 1),
        prefix + "experts.gate_up_proj_bias": gate_up_bias.view(experts, 2, -1).transpose(1, 2),
        prefix + "experts.down_proj": expert_down_proj(down, experts, gate_up.shape[1]).transpose(1, 2),
        prefix + "experts.down_proj_bias": down_bias.view(experts, -1),
    }


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
        prefix + "experts.down_proj": expert_down_proj(down, experts, gate_up.shape[1]),
    }


def as_saved(config: ModelConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What files hold of a parameter: of experts, which a module stacks, each one's matrices, under other names."""
    family = FAMILIES.get(config.model_type)
    experts = family.experts if family else None
    if experts is None or ".mlp." not in name:
        return {name: tensor}
    prefix, _, part = name.partition("mlp.")
    if experts.transposed:
        return _of_transposed(experts, prefix, part, as_packed(config, name, tensor))
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


def _of_transposed(experts: Experts, prefix: str, part: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each expert's matrices and biases, of a stack as a view of it is."""
    if not part.startswith("experts."):
        return {f"{prefix}mlp.{part}": tensor}
    is_bias, saved = part.endswith("_bias"), {}

    def add(name: str, index: int, own: torch.Tensor) -> None:
        name = prefix + name.format(index)
        saved[name.replace(".weight", ".bias") if is_bias else name] = own if is_bias else own.T

    for index, own in enumerate(tensor):
        if "down_proj" in part:
            add(experts.saved_down, index, own)
        else:
            add(experts.saved_gate, index, own[..., 0])
            add(experts.saved_up, index, own[..., 1])
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
    if _alternates(config, name) and parameter.dim() == (2 if name.endswith("_bias") else 3):
        parameter = parameter.unflatten(-1, (-1, 2))
    return parameter


def fill_rope(
    weights: ModelWeights,
    hf_config: PreTrainedConfig,
    module: PreTrainedModel | None = None,
    frequency_factors: torch.Tensor | None = None,
) -> None:
    """Rotary tables into the weights; see ``rope_tables`` for the arguments and errors."""
    tables = rope_tables(hf_config, len(weights.rope_cos), module, frequency_factors)
    pairs = [(weights.rope_cos, weights.rope_sin), (weights.second_rope_cos, weights.second_rope_sin)]
    for (own_cos, own_sin), (cos, sin) in zip(pairs, tables, strict=False):
        if own_cos is not None and own_sin is not None:
            own_cos.copy_(cos)
            own_sin.copy_(sin)
    if weights.query_scale is not None:
        weights.query_scale.copy_(query_scales(hf_config, len(weights.query_scale)))


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

    Norms and biases are copied to fp32; matrices move, but for gates and ups in alternate columns (gpt-oss), which are
    copied. With another ``dtype`` than the module's the module is left
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
            shared = view.dtype == parameters[name].dtype and view.dim() >= 2 and view.shape == parameters[name].shape
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
