"""Loads a chat model by name, in the process that is to run it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipkernels.chat.chat import ChatModel
from skipkernels.chat.skip_levels import (
    MOST_OF_NEURONS,
    USUAL_LEVELS,
    check_levels,
    own_levels,
    policies_of_files,
    policies_of_levels,
    usual_levels,
)
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, Policy

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from skipkernels.chat.text_model import Metric


@dataclass(frozen=True)
class ChatModelLoader:
    """Calling it loads the model. Paths are read in the process that calls it.

    Args:
        name: what the model is called.
        path: a folder with a checkpoint, or a hub id, of a text model or of a family in ``chat.multimodal``.
        skip_levels: shares of FFN bytes to leave out, one strategy each; 0 is dense. None: those of ``USUAL_LEVELS``
            that the policy can hold.
        policy_files: one is held at every level by its controller; of several, each is a level. Without any,
            single neurons are left out where the weights allow it, by thresholds that are measured after loading
            (``TextModel.open_levels``); elsewhere the model is served dense.
        metric: what the profile's accuracies mean.
        options: of ``Engine.from_pretrained``.
        measures: whether levels without a policy file can be measured where the model is loaded.
    """

    name: str
    path: str
    skip_levels: Sequence[float] | None
    policy_files: Sequence[str]
    metric: Metric
    options: Mapping[str, Any]
    measures: bool = True

    def __call__(self) -> ChatModel:
        """
        Raises:
            SkipkernelsError: see ``Engine.from_pretrained``; a policy file is not this model's; ``skip_levels`` are
                wanted without a policy file where neurons cannot be left out.
        """
        import torch
        from transformers.utils import logging as transformers_logging

        from skipkernels.chat.multimodal.families import FAMILIES
        from skipkernels.model.checkpoint import load_config, resolve_checkpoint
        from skipkernels.skipping.policy_file import load_policy

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        if (threads := self.options.get("num_threads")) is not None:
            torch.set_num_threads(threads)
        source = resolve_checkpoint(self.path)
        config = load_config(source)
        multimodal = config.model_type in FAMILIES
        policies = self._policies(config.get_text_config().num_hidden_layers)
        open_levels = () if self.policy_files else self._open_levels(source, config, multimodal)
        neurons = bool(open_levels) or any(getattr(policy, "has_neuron_rule", False) for policy in policies.values())
        options = {**self.options, "neuron_rows": neurons}
        load = self._load_multimodal if multimodal else self._load_text
        model = load(policies, open_levels, options)
        for file in self.policy_files:
            load_policy(file, fingerprint=model.fingerprint.partition("-")[0])  # refuses another model's
        return model

    def _policies(self, num_layers: int) -> dict[float, Policy]:
        from skipkernels.skipping.policy_file import load_policy

        if self.skip_levels is not None:
            check_levels(self.skip_levels)
        if not self.policy_files:
            dense = self.skip_levels is None or 0.0 in self.skip_levels
            return {0.0: DensePolicy()} if dense else {}
        if len(self.policy_files) > 1:
            policies = policies_of_files(self.policy_files)
            return policies if self.skip_levels is None else own_levels(policies, self.skip_levels)
        base = load_policy(self.policy_files[0])
        levels = usual_levels(base, num_layers) if self.skip_levels is None else self.skip_levels
        if levels == [0.0] and self.skip_levels is None:  # it holds no ratio: it is its own level
            return policies_of_files(self.policy_files)
        return policies_of_levels(base, levels)

    def _open_levels(self, source: Path, config: PreTrainedConfig, multimodal: bool) -> tuple[float, ...]:
        """Levels whose thresholds have to be measured.

        Raises:
            PolicyError: levels are asked for that cannot be.
        """
        wanted = tuple(level for level in self.skip_levels or USUAL_LEVELS if level > 0.0)
        if not wanted:
            return ()
        reason = self._no_neurons(source)
        if reason is None and self.skip_levels is None and self._is_quantised(source, config):
            reason = "single neurons of quantised weights save reading, but hardly time; --skip-levels asks for them"
        if reason is None and (multimodal or not self.measures):
            reason = "thresholds are measured for a text model in the server's own process only"
        if max(wanted) >= MOST_OF_NEURONS:
            raise PolicyError(
                f"skip level {max(wanted):g} cannot be held: a third of an FFN's bytes, gate_proj, is always read"
            )
        if reason is None:
            return wanted
        if self.skip_levels is not None:
            raise PolicyError(f"skip level {wanted[0]:g} needs a policy file (--policy): {reason}")
        logger.warning(
            "%s is served dense, without skip levels: %s; a policy file (--policy) brings some", self.name, reason
        )
        return ()

    def _is_quantised(self, source: Path, config: PreTrainedConfig) -> bool:
        import torch

        from skipkernels.model.config import quantization_of
        from skipkernels.model.gguf_file import GgufFile
        from skipkernels.model.matrix import FLOAT_FORMATS
        from skipkernels.model.recipe import resolve_weights

        dtype = self.options.get("dtype")
        if dtype is not None:
            return not isinstance(resolve_weights(dtype), torch.dtype)
        if source.is_file():
            kinds = {tensor.type.name.lower() for tensor in GgufFile(source).tensors.values()}
            return not kinds <= FLOAT_FORMATS.keys()
        return quantization_of(config) is not None

    def _no_neurons(self, source: Path) -> str | None:
        """Why single neurons cannot be left out of these weights; None: they can."""
        from skipkernels.engine import Engine

        if self.options.get("device", "cpu") != "cpu":
            return "thresholds for single neurons are measured on device cpu only"
        return Engine.no_neurons_of(source, self.options.get("dtype"))

    def _load_text(
        self, policies: Mapping[float, Policy], open_levels: tuple[float, ...], options: Mapping[str, Any]
    ) -> ChatModel:
        from skipkernels.chat.text_model import TextModel
        from skipkernels.engine import Engine

        engine = Engine.from_pretrained(self.path, **options)
        return TextModel(self.name, engine, policies, self.metric, open_levels)

    def _load_multimodal(
        self, policies: Mapping[float, Policy], open_levels: tuple[float, ...], options: Mapping[str, Any]
    ) -> ChatModel:
        from skipkernels.chat.multimodal.multimodal_model import MultimodalModel

        assert not open_levels, "they are for text models"
        model = MultimodalModel.from_pretrained(self.path, policies, self.metric, **options)
        model.name = self.name
        return model
