"""A multimodal language model of transformers as a ``ModalityModel``: its text decoder runs on our engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skipkernels.chat.chat import ChatFormat, Completion
from skipkernels.chat.multimodal.encoders import Encoders
from skipkernels.chat.multimodal.families import family_of, load_module, load_processor
from skipkernels.chat.multimodal.multimodal_format import MultimodalFormat, MultimodalPrompt
from skipkernels.chat.reply import complete
from skipkernels.chat.text_model import Metric, check_policies, policies_hash, prefill_share
from skipkernels.engine import Engine
from skipkernels.modality.strategy import Inputs, Strategy, all_strategies
from skipkernels.model.checkpoint import resolve_checkpoint
from skipkernels.model.config import resolve_dtype
from skipkernels.model.prompt import EmbeddedPrompt
from skipkernels.skipping.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class MultimodalModel:
    """A ``ChatModel``. Modalities that a strategy leaves out are not encoded and have no tokens in the prompt.

    Args:
        module: its decoder is removed; the decoder's weights are shared with the engine.
        policies: by skip level; level 0 is the dense model's.
        metric: what the profile's accuracies mean.
        options: of ``Engine.from_pretrained``; its ``max_batch_size`` is the largest batch.

    Raises:
        ModelError, PolicyError, RequestError, DeviceError: as from the engine; the module is unchanged.
    """

    def __init__(
        self,
        name: str,
        module: PreTrainedModel,
        processor: ProcessorMixin,
        policies: Mapping[float, Policy],
        metric: Metric,
        **options: Any,
    ) -> None:
        family = family_of(module.config.model_type)
        check_policies(policies, module.config.get_text_config().num_hidden_layers)
        self.engine = engine = Engine.from_pretrained(module, tokenizer=processor.tokenizer, **options)
        self.encoders = Encoders(module)
        self._policies = dict(policies)
        self._metric = metric
        self.name = name
        self.device = engine.execution.device
        self.dtype = engine.dtype
        self.modalities = ("text", *family.modalities)
        self.strategies = all_strategies(self.modalities, tuple(policies), required=("text",))
        self.fingerprint = f"{engine.fingerprint}-{_encoders_hash(self.encoders)}-{policies_hash(policies)}"
        self.format: ChatFormat = MultimodalFormat(
            processor, self.modalities, engine.max_seq_len, prefill_share(engine)
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        policies: Mapping[float, Policy],
        metric: Metric,
        *,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> MultimodalModel:
        """Loads a checkpoint with its processor.

        Args:
            model: a folder with a Hugging Face checkpoint, or a hub id.
            device: where encoders and decoder run.
            dtype: fp32, bf16 or fp16; None takes the checkpoint's own.
            policies, metric, options: as for the constructor.

        Raises:
            ModelError: the family is not served, or a part of the checkpoint is missing or cannot be read.
        """
        folder = resolve_checkpoint(model)
        module = load_module(folder, None if dtype is None else resolve_dtype(dtype), device)
        processor = load_processor(folder, module.config.model_type)
        return cls(str(model), module, processor, policies, metric, device=device, **options)

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> list[Completion]:
        """Encodes the modalities that ``strategy`` keeps, one request at a time, then decodes all prompts as a batch.
        Each row ends at its own limit, stop string or end of sequence."""
        prompts = [self.prompt(inputs, strategy) for inputs in batch]
        return complete(self.engine, self.policy(strategy), batch, prompts)

    def policy(self, strategy: Strategy) -> Policy:
        return self._policies[strategy.skip_level]

    def prompt(self, inputs: Inputs, strategy: Strategy) -> EmbeddedPrompt:
        """The decoder's input for one request."""
        text: MultimodalPrompt = inputs["text"]
        media = [inputs[modality] for modality in strategy.modalities if modality != "text"]
        return self.encoders(text.token_ids[strategy.modalities], media)

    def score(self, output: Completion, expected: str) -> float:
        return self._metric(output.text, expected)


def _encoders_hash(encoders: Encoders) -> str:
    """Eight hex digits over all parameter names and the values of norms and biases. Values are hashed as bf16, so that
    a checkpoint has the same hash in every dtype."""
    digest = hashlib.sha256()
    for name, parameter in encoders.parameters().items():
        digest.update(name.encode())
        if parameter.dim() == 1:
            digest.update(parameter.detach().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
