"""Whether a loaded module computes what its configuration says, and nothing else.

The decode program reads parameters and never calls the module. Whatever would change the module's output without
being a known parameter (a quantised layer, an adapter, a hook, a replaced part) is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.modules import module as torch_module

from skipkernels.errors import ModelError
from skipkernels.model.config import DTYPES, GATE_LIMIT, GATE_SLOPE, ModelConfig, quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OUTPUT_CAPTURING = "transformers.utils.output_capturing"
"""Hooks of this module watch: transformers installs them when hidden states are asked for."""


def check_module(
    module: PreTrainedModel, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str
) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module's text decoder and head by name; all of ``shapes``.

    Raises:
        ModelError: the module is not what the decode program would compute; nothing was changed.
    """
    decoder, head = module.get_decoder(), head_of(module)
    if (settings := quantization_of(module.config)) is not None:
        method = settings.get("quant_method")
        raise ModelError(
            f"{type(module).__name__}: is quantised ({getattr(method, 'value', method)}), and modules are read as "
            "floats only; give the folder of the checkpoint instead"
        )
    parameters = {f"model.{name}": parameter for name, parameter in decoder.named_parameters()}
    parameters["lm_head.weight"] = cast(torch.nn.Parameter, head.weight)
    parts = {"": module, **{f"model.{name}".rstrip("."): part for name, part in decoder.named_modules()}}
    for name, part in {**parts, "lm_head": head}.items():
        _check_part(name, part, config)
    for name, shape in shapes.items():
        if name not in parameters:
            raise ModelError(f"{type(module).__name__}: parameter {name!r} is missing")
        _check_parameter(name, parameters[name], shape, torch.device(device))
    _refuse_unknown(parameters, shapes, decoder, head)
    _check_attention(module)
    return {name: parameters[name] for name in shapes}


def head_of(module: PreTrainedModel) -> torch.nn.Module:
    head = module.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(module).__name__} has no language-model head; load the module that has one")
    return head


def shares_embeddings(module: PreTrainedModel) -> bool:
    """Whether the head of a module is its embedding table. What its text decoder's configuration says of that does not
    hold in every multimodal module."""
    return head_of(module).weight is module.get_input_embeddings().weight


def _check_parameter(name: str, parameter: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if parameter.dtype not in DTYPES.values() or type(parameter.data) is not torch.Tensor:
        kind = f"a {type(parameter.data).__name__} of {parameter.dtype}"
        raise ModelError(
            f"{name!r} is {kind}, expected a tensor of {', '.join(DTYPES)}; quantised modules are not read"
        )
    if tuple(parameter.shape) != shape:
        raise ModelError(f"{name!r} has shape {tuple(parameter.shape)}, expected {shape}")
    if parameter.device.type != device.type:
        raise ModelError(f"{name!r} is on {parameter.device}; move the module to {device.type} first")


def _refuse_unknown(
    parameters: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    decoder: torch.nn.Module,
    head: torch.nn.Module,
) -> None:
    extra = [name for name in parameters if name not in shapes and name != "lm_head.weight"]
    known = ("rotary_emb.", "embed_tokens.embed_scale")
    extra += [f"model.{name}" for name, _ in decoder.named_buffers() if not name.startswith(known)]
    extra += [f"lm_head.{name}" for name, _ in (*head.named_parameters(), *head.named_buffers()) if name != "weight"]
    if extra:
        raise ModelError(
            f"parameter {extra[0]!r} means nothing to this model; merge adapters and remove additions first"
        )


def _check_part(name: str, part: torch.nn.Module, config: ModelConfig) -> None:
    """A submodule must be of a class that is known, compute by that class's own code and have no hooks."""
    title = name or type(part).__name__
    kind = type(part)
    if name and not _is_known(name.rpartition(".")[2], kind, config):
        raise ModelError(f"{title!r} is a {kind.__module__}.{kind.__name__}, which the decode program does not know")
    origin = inspect.unwrap(kind.forward).__module__ or ""
    replaced = "forward" in vars(part) and not _is_placed_by_accelerate(title, part)
    if replaced or not origin.startswith(("transformers.models.", "transformers.activations", "torch.")):
        raise ModelError(f"the forward of {title!r} was replaced (by {origin}); the decode program would not call it")
    for hooks in (*_hooks(part), torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        for hook in hooks.values():
            if getattr(hook, "__module__", None) != _OUTPUT_CAPTURING:
                raise ModelError(f"{title!r} has a hook ({hook}); the decode program would not call it")
    if part.training and (bool(getattr(part, "attention_dropout", None)) or isinstance(part, torch.nn.Dropout)):
        raise ModelError(f"{title!r} drops at random; call eval() on the module first")
    for attribute, expected in _expected_attributes(part, config).items():
        value = getattr(part, attribute)
        if value != expected:
            raise ModelError(f"{title!r} has {attribute}={value}, its configuration says {expected}")


def _is_placed_by_accelerate(title: str, part: torch.nn.Module) -> bool:
    """Whether accelerate has replaced a forward by one that moves inputs to the weights' device, and does no more.

    Raises:
        ModelError: it also fetches the weights, which lie elsewhere.
    """
    hook, own = getattr(part, "_hf_hook", None), getattr(part, "_old_forward", None)
    replacement = getattr(vars(part)["forward"], "func", None)
    if (type(hook).__module__, type(hook).__name__) != ("accelerate.hooks", "AlignDevicesHook"):
        return False
    if getattr(replacement, "__module__", None) != "accelerate.hooks":
        return False
    if getattr(own, "__func__", None) is not type(part).forward:
        return False
    if getattr(hook, "offload", True):
        raise ModelError(
            f"{title!r} was offloaded by accelerate, so its weights are not in the module; load it without device_map, "
            "or give the folder of the checkpoint"
        )
    return True


_TORCH_CLASSES: dict[str, type[torch.nn.Module]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), torch.nn.Linear),
    **dict.fromkeys(("qkv_proj", "gate_up_proj"), torch.nn.Linear),
    **dict.fromkeys(("resid_attn_dropout", "resid_mlp_dropout"), torch.nn.Dropout),
    "lm_head": torch.nn.Linear,
    "embed_tokens": torch.nn.Embedding,
    "layers": torch.nn.ModuleList,
}


_ACTIVATION_CLASSES = {"silu": ("SiLU", "SiLUActivation"), "gelu_tanh": ("GELUTanh", "PytorchGELUTanh")}


def _is_known(role: str, kind: type[torch.nn.Module], config: ModelConfig) -> bool:
    own = kind.__module__.startswith("transformers.models.")
    if role == "embed_tokens" and config.rounds_embed_scale:
        return own and kind.__name__.endswith("ScaledWordEmbedding")
    if role in _TORCH_CLASSES:
        return kind is _TORCH_CLASSES[role]
    if role in ("act_fn", "activation_fn"):
        known = _ACTIVATION_CLASSES[config.activation]
        return kind.__name__ in known and kind.__module__.startswith(("torch.", "transformers."))
    return own and (not role.endswith("norm") or kind.__name__.endswith("RMSNorm"))


def _hooks(part: torch.nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return cast("dict[int, Any]", part._forward_hooks), cast("dict[int, Any]", part._forward_pre_hooks)


def _expected_attributes(part: torch.nn.Module, config: ModelConfig) -> dict[str, object]:
    """What a part of a decoder remembers of the configuration it was made from."""
    kind = type(part).__name__
    if kind.endswith("RMSNorm"):
        return {"variance_epsilon" if hasattr(part, "variance_epsilon") else "eps": config.rms_norm_eps}
    if isinstance(part, torch.nn.Embedding):
        scale = {"scalar_embed_scale": config.embed_scale} if config.rounds_embed_scale else {}
        return {"max_norm": None, **scale}
    if kind.endswith("Experts") and config.activation == "clamped_swiglu":
        return {"alpha": GATE_SLOPE, "limit": GATE_LIMIT}
    if kind.endswith("Attention"):
        return {
            "scaling": config.scaling,
            "is_causal": True,
            "head_dim": config.head_dim,
            "num_key_value_groups": config.num_attention_heads // config.num_key_value_heads,
        }
    return {}


def _check_attention(module: PreTrainedModel) -> None:
    implementation = module.config.get_text_config()._attn_implementation or "eager"
    if implementation not in ("eager", "sdpa", "flex_attention") and "flash" not in implementation:
        raise ModelError(f"the module's attention is {implementation!r}, which the decode program does not know")
