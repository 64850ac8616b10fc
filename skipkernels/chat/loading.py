"""Loads a chat model by name, in the process that is to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skipkernels.chat.chat import ChatModel
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, Policy, SkipPolicy

if TYPE_CHECKING:
    from skipkernels.chat.text_model import Metric

USUAL_LEVELS = (0.0, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class ChatModelLoader:
    """Calling it loads the model. Paths are read in the process that calls it.

    Args:
        name: what the model is called.
        path: a folder with a checkpoint, or a hub id, of a text model or of a family in ``chat.multimodal``.
        skip_levels: skip ratios to hold, one strategy each; 0 is dense. None: those of ``USUAL_LEVELS`` that the policy
            can hold.
        policy_file: a ``skip_policy.json`` with span, dense layers and warm-up of all levels; None: the defaults.
        metric: what the profile's accuracies mean.
        options: of ``Engine.from_pretrained``.
    """

    name: str
    path: str
    skip_levels: Sequence[float] | None
    policy_file: str | None
    metric: Metric
    options: Mapping[str, Any]

    def __call__(self) -> ChatModel:
        """
        Raises:
            SkipkernelsError: see ``Engine.from_pretrained``; the policy file is not this model's.
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
        config = load_config(resolve_checkpoint(self.path))
        base = load_policy(self.policy_file) if self.policy_file else SkipPolicy()
        levels = self.skip_levels
        if levels is None:
            levels = usual_levels(base, config.get_text_config().num_hidden_layers)
        policies = policies_of_levels(base, levels)
        model = self._load_multimodal(policies) if config.model_type in FAMILIES else self._load_text(policies)
        if self.policy_file:
            load_policy(self.policy_file, fingerprint=model.fingerprint.partition("-")[0])  # refuses another model's
        return model

    def _load_text(self, policies: Mapping[float, Policy]) -> ChatModel:
        from skipkernels.chat.text_model import TextModel
        from skipkernels.engine import Engine

        return TextModel(self.name, Engine.from_pretrained(self.path, **self.options), policies, self.metric)

    def _load_multimodal(self, policies: Mapping[float, Policy]) -> ChatModel:
        from skipkernels.chat.multimodal.multimodal_model import MultimodalModel

        model = MultimodalModel.from_pretrained(self.path, policies, self.metric, **self.options)
        model.name = self.name
        return model


def usual_levels(base: Policy, num_layers: int) -> list[float]:
    """Those of ``USUAL_LEVELS`` that ``base`` can hold in a model of ``num_layers``."""
    reachable = base.reachable_ratio(num_layers) if isinstance(base, SkipPolicy) else 0.0
    return [level for level in USUAL_LEVELS if level == 0.0 or level < reachable]


def policies_of_levels(base: Policy, skip_levels: Sequence[float]) -> dict[float, Policy]:
    """The policy of each skip level.

    Raises:
        PolicyError: ``base`` cannot hold a ratio, or a level is impossible or given twice.
    """
    if len(set(skip_levels)) < len(skip_levels) or not skip_levels:
        raise PolicyError(f"skip levels must differ, and there must be one; got {list(skip_levels)}")
    if any(skip_levels) and not isinstance(base, SkipPolicy):
        raise PolicyError(f"skip levels are held by a similarity policy; a policy of kind {base.kind!r} holds none")
    policies: dict[float, Policy] = {}
    for level in sorted(skip_levels):
        if level == 0.0:
            policies[level] = DensePolicy()
        else:
            assert isinstance(base, SkipPolicy)
            policies[level] = replace(base, target_ratio=level)
    return policies
