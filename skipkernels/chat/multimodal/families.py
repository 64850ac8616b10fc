"""The supported multimodal families of transformers: their classes, and their modalities besides text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipkernels.errors import ModelError
from skipkernels.model.checkpoint import load_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Args:
        module: class in transformers.
        modalities: besides ``text``; each can be left out.
    """

    module: str
    modalities: tuple[str, ...]


_OMNI = Family("Qwen2_5OmniThinkerForConditionalGeneration", ("audio", "image"))
FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", ("image",)),
    "qwen2_audio": Family("Qwen2AudioForConditionalGeneration", ("audio",)),
    "qwen2_5_omni": _OMNI,
    "qwen2_5_omni_thinker": _OMNI,
}


def family_of(model_type: str) -> Family:
    """Raises ModelError for a family that is not supported."""
    if model_type not in FAMILIES:
        raise ModelError(f"{model_type!r} is not served as a multimodal model; served are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def load_module(folder: Path, dtype: torch.dtype | None, device: str) -> PreTrainedModel:
    """The module of a checkpoint on ``device``, in ``dtype`` or by default its own.

    Raises:
        ModelError: another family, or the checkpoint cannot be read or lacks a tensor.
    """
    import transformers

    module_class = getattr(transformers, family_of(load_config(folder).model_type).module)
    try:
        module, loading = module_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    except Exception as error:  # transformers raises many types
        raise ModelError(f"{folder}: cannot be loaded ({' '.join(str(error).split())})") from error
    if loading["missing_keys"]:  # transformers would initialise them at random
        raise ModelError(f"{folder}: tensor {min(loading['missing_keys'])!r} is missing from the checkpoint")
    return module.to(device)


def load_processor(folder: Path, model_type: str) -> ProcessorMixin:
    """The processor of a checkpoint.

    Raises:
        ModelError: it is missing, or has no chat template.
    """
    from transformers import AutoProcessor

    from skipkernels.chat.multimodal.omni_processor import ImageAudioProcessor

    processor_class = ImageAudioProcessor if family_of(model_type) is _OMNI else AutoProcessor
    try:
        processor = processor_class.from_pretrained(folder)
    except Exception as error:  # many types, too
        raise ModelError(f"{folder}: its processor cannot be loaded ({' '.join(str(error).split())})") from error
    if not getattr(processor, "chat_template", None):
        raise ModelError(f"{folder}: its processor has no chat template, by which a chat becomes a prompt")
    return processor
