"""Small GGUF files for tests, written by the ``gguf`` package: what llama.cpp's converter makes of a random module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "rope_freqs": "rope_freqs",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
OLMO2_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OWN_NAMES = {"gemma2": GEMMA_NAMES, "gemma3": GEMMA_NAMES, "olmo2": OLMO2_NAMES}
ARCHITECTURES = {"gemma3_text": "gemma3", "olmo3": "olmo2", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
"""GGUF's, where it is not Hugging Face's model_type."""


def gguf_name(name: str, arch: str = "llama") -> str:
    stem, _, kind = name.rpartition(".") if "." in name else (name, "", "weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        own = OWN_NAMES.get(arch, {})
        return f"blk.{layer}.{own.get(part) or NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def llama_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Pairs of channels side by side, as llama.cpp's rotary embedding has them; transformers has them half a head
    apart."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def blocks(values: np.ndarray, kind: Type, generator: np.random.Generator) -> np.ndarray:
    """Quantised by the package, or, of types that it only reads, random blocks with small scales."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind, generator)


SCALES = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
"""Where the fp16 scales of a block stand, in bytes."""


def random_blocks(shape: tuple[int, ...], kind: Type, generator: np.random.Generator) -> np.ndarray:
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // columns
    data = generator.integers(0, 256, (count, size), dtype=np.uint8)
    for at in SCALES.get(kind, (0,)):
        scale = generator.uniform(-0.004, 0.004, count).astype(np.float16)
        data[:, at : at + 2] = scale.view(np.uint8).reshape(count, 2)
    if kind is Type.MXFP4:
        data[:, 0] = generator.integers(110, 122, count)
    return data.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path, module: Any, kind: Type = Type.F32, special: dict[str, Type] | None = None, **metadata: Any
) -> Path:
    """``module`` with its matrices in ``kind``, or where ``special`` has their GGUF name's part, in another."""
    config, generator = module.config, np.random.default_rng(0)
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if arch == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, parameter in stacked_alone(module).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, own = parameter.detach().float().numpy(), gguf_name(name, arch)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(own.split(".")[-2])
        if arch == "llama" and heads:
            values = llama_order(values, heads)
        of = next((to for part, to in (special or {}).items() if part in own), kind)
        if values.ndim == 1 or of is Type.F32 or "ffn_gate_inp" in own:  # as in llama.cpp's files
            writer.add_tensor(own, values)
        else:
            writer.add_tensor(own, blocks(values, of, generator), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stacked_alone(module: Any) -> dict[str, torch.Tensor]:
    """The parameters of ``module``, where gate_up_proj holds the experts' gates and ups as two views of it."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in module.state_dict().items():
        stem, _, own = name.rpartition(".")
        if own == "gate_up_proj":
            found[f"{stem}.gate_proj.weight"], found[f"{stem}.up_proj.weight"] = parameter.chunk(2, dim=1)
        else:
            found[name + (".weight" if stem.endswith(".experts") else "")] = parameter
    return found


def read_back(path: Path, module: Any) -> Any:
    """``module`` with the values that the file's blocks stand for, dequantised by the package."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    config = module.config
    with torch.no_grad():
        for name, parameter in stacked_alone(module).items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            tensor = tensors[gguf_name(name)]
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            count = heads.get(tensor.name.split(".")[-2])
            if config.model_type in ("llama", "mixtral") and count:
                half = len(values) // count // 2
                values = values.reshape(count, half, 2, -1).swapaxes(1, 2).reshape(parameter.shape)
            parameter.copy_(torch.from_numpy(values.copy()))
    return module
