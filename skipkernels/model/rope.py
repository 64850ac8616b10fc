"""Rotary tables, by the scaling rules of transformers.

Only the rules are imported: transformers' rotary embeddings draw in its whole modelling code, which takes
three seconds, longer than loading a small model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import rope_by_kind
from skipkernels.model.family import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Table = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [positions, rotary_pairs], fp32."""


def rope_tables(
    hf_config: PreTrainedConfig,
    positions: int,
    module: PreTrainedModel | None = None,
    frequency_factors: torch.Tensor | None = None,
) -> list[Table]:
    """The table of most layers and then that of the second_rope_layers, where the family has such.

    Args:
        hf_config: of the text model.
        positions: number of rows of each table.
        module: a loaded model, whose frequencies are taken: it was perhaps cast to another dtype as a whole.
        frequency_factors: what each frequency is divided by [rotary_pairs]; a GGUF file may hold them.

    Raises:
        ModelError: the rotary parameters cannot be used; they are in the message.
    """
    family = family_of(hf_config)
    tables = [
        _table(hf_config, kind, rope, positions, module, frequency_factors)
        for kind, rope in rope_by_kind(hf_config, family).items()
    ]
    if family.layers_without_rope:
        tables.append((torch.ones_like(tables[0][0]), torch.zeros_like(tables[0][1])))  # an angle of 0 everywhere
    return tables


def query_scales(hf_config: PreTrainedConfig, positions: int) -> torch.Tensor:
    """By what queries are multiplied at each position [positions], fp32: Ministral 3."""
    rope = hf_config.rope_parameters
    steps = torch.floor(torch.arange(positions) / rope["original_max_position_embeddings"])
    return 1 + rope["llama_4_scaling_beta"] * torch.log(1 + steps)


def rope_frequencies(hf_config: PreTrainedConfig, positions: int) -> tuple[torch.Tensor, float]:
    """Frequencies [rotary_pairs], fp32, of sequences of up to ``positions`` tokens, and what cosines and sines are
    multiplied by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = hf_config.rope_parameters["rope_type"]
    if kind == "default":
        return unscaled_frequencies(hf_config), 1.0
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"), seq_len=positions)
    return frequencies, scaling


def unscaled_frequencies(hf_config: PreTrainedConfig) -> torch.Tensor:
    """Frequencies [rotary_pairs], fp32, before any scaling for longer sequences."""
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    width = int(head_dim * hf_config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / (hf_config.rope_parameters["rope_theta"] ** exponents)


def _table(
    hf_config: PreTrainedConfig,
    kind: str | None,
    rope: dict[str, object],
    positions: int,
    module: PreTrainedModel | None,
    frequency_factors: torch.Tensor | None,
) -> Table:
    try:
        with torch.inference_mode(False), torch.no_grad():
            of_kind = copy.copy(hf_config)
            of_kind.rope_parameters = rope
            frequencies, scaling = rope_frequencies(of_kind, positions)
            if module is not None and rope["rope_type"] != "longrope":  # which goes by the length
                frequencies, scaling = _of_module(module, kind, frequencies, scaling)
            if frequency_factors is not None:
                frequencies = frequencies / frequency_factors
            angles = torch.arange(positions).float()[:, None] * frequencies.float()
            return angles.cos() * scaling, angles.sin() * scaling
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"rotary parameters {rope} cannot be used ({error})") from error


def _of_module(
    module: PreTrainedModel, kind: str | None, frequencies: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, float]:
    """What the module's own embedding holds; as given where no layer of it is of the kind."""
    own, prefix = module.get_decoder().rotary_emb, f"{kind}_" if kind else ""
    if kind is not None and not hasattr(own, prefix + "inv_freq"):
        return frequencies, scaling
    held = cast(torch.Tensor, getattr(own, prefix + "inv_freq"))
    return held.detach().cpu().clone(), cast(float, getattr(own, prefix + "attention_scaling"))
