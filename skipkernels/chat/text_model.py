"""A language model on this project's engine as a ``ModalityModel``: one modality, a policy for each skip level."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

from skipkernels.chat.chat import ChatFormat, Completion
from skipkernels.chat.reply import complete
from skipkernels.chat.text_format import TextFormat
from skipkernels.engine import Engine, Prompt
from skipkernels.errors import PolicyError, RequestError
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.skipping.policy import DensePolicy, Policy

Metric = Callable[[str, str], float]
"""(text, expected text) -> score in [0, 1]."""
_TIMED_PROMPT, _TIMED_STEPS, _ROUNDS = 256, 16, 3


def exact_match(text: str, expected: str) -> float:
    """1 for the expected text, white space around it aside."""
    return float(text.strip() == expected.strip())


def shared_prefix(text: str, expected: str) -> float:
    """The share of the expected text up to the first difference."""
    same = next((at for at, pair in enumerate(zip(text, expected, strict=False)) if pair[0] != pair[1]), None)
    length = min(len(text), len(expected)) if same is None else same
    return length / len(expected) if expected else float(not text)


class TextModel:
    """A ``ChatModel``: its inputs are ``TextPrompt``, its outputs ``Completion``.

    Args:
        engine: with a tokenizer; its ``max_batch_size`` is the largest batch.
        policies: by skip level; level 0 is the dense model's.
        metric: what the profile's accuracies mean.
        open_levels: skip levels whose policies are still to be measured and ``offer``ed.
    """

    modalities: tuple[str, ...] = ("text",)

    def __init__(
        self,
        name: str,
        engine: Engine,
        policies: Mapping[float, Policy],
        metric: Metric,
        open_levels: Sequence[float] = (),
    ) -> None:
        if engine.tokenizer is None:
            raise RequestError(f"{name} has no tokenizer, and chats are text; serve a checkpoint with one")
        self.name = name
        self.device = engine.execution.device
        self.dtype = engine.dtype
        self.engine = engine
        self.format: ChatFormat = TextFormat(engine.tokenizer, engine.max_seq_len, prefill_share(engine))
        self.open_levels = tuple(open_levels)
        check_reach(engine, open_levels)
        self._metric = metric
        self._policies: dict[float, Policy] = {}
        self._offer(policies)

    def offer(self, policies: Mapping[float, Policy]) -> None:
        """Policies of open levels have been measured: they are strategies from now on."""
        assert set(policies) <= set(self.open_levels), f"open are {self.open_levels}, got {list(policies)}"
        self.open_levels = tuple(level for level in self.open_levels if level not in policies)
        self._offer(policies)

    def _offer(self, policies: Mapping[float, Policy]) -> None:
        check_policies(policies, self.engine.config.num_hidden_layers)
        self._policies = {**self._policies, **policies}
        self.strategies = tuple(Strategy(("text",), level) for level in self._policies)
        self.fingerprint = f"{self.engine.fingerprint}-{policies_hash(self._policies)}"

    def only(self, strategies: Sequence[Strategy]) -> TextModel:
        """The same model on the same engine, as if these of its strategies were all."""
        assert set(strategies) <= set(self.strategies), f"there are {self.strategies}, got {strategies}"
        seen = copy.copy(self)
        seen.strategies = tuple(strategies)
        return seen

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> list[Completion]:
        """Decodes the prompts together; each row ends at its own limit, stop string or end of sequence."""
        prompts = [self.prompt(inputs, strategy) for inputs in batch]
        return complete(self.engine, self.policy(strategy), batch, prompts)

    def prompt(self, inputs: Inputs, strategy: Strategy) -> Prompt:
        """What the engine decodes from."""
        return inputs["text"].token_ids

    def policy(self, strategy: Strategy) -> Policy:
        return self._policies[strategy.skip_level]

    def score(self, output: Completion, expected: str) -> float:
        return self._metric(output.text, expected)


def check_reach(engine: Engine, levels: Sequence[float]) -> None:
    """Raises PolicyError for a level that no thresholds for neurons hold."""
    reachable = float(engine.weights.neuron_shares().sum(-1).mean())
    for level in levels:
        if level >= reachable:
            raise PolicyError(
                f"skip level {level:g} cannot be held: the neurons of up_proj and down_proj take {reachable:.3f} of "
                "these weights' FFN bytes; gate_proj and the scales that neurons share are always read"
            )


def check_policies(policies: Mapping[float, Policy], num_layers: int) -> None:
    """Raises PolicyError for a policy that a model of this depth cannot have, or that its skip level belies."""
    for level, policy in policies.items():
        if (policy.plan(num_layers) is None) != (level == 0.0):
            raise PolicyError(f"skip level {level} stands for policy {policy.label}; only level 0 skips nothing")


def policies_hash(policies: Mapping[float, Policy]) -> str:
    """Eight hex digits over the policies of all skip levels, for fingerprints."""
    written = json.dumps({str(level): policy.to_dict() for level, policy in policies.items()}, sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:8]


def prefill_share(engine: Engine) -> float:
    """What a token of the prompt costs, as a share of a new token; measured, dense, batch 1.

    Whatever else the machine does only adds to a time, so the least of several is taken.
    """
    tokens = min(_TIMED_PROMPT, engine.max_seq_len // 2)
    steps = min(_TIMED_STEPS, engine.max_seq_len - tokens)
    prefills, decodes = [], []
    executor = engine.executor_for(DensePolicy())
    with engine.loop.own_rows() as own:
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            own.begin(0, [0] * tokens)
            began = time.perf_counter()
            own.start()
            executor.run(steps)
            prefills.append(began - started)
            decodes.append(time.perf_counter() - began)
    return min(prefills) / tokens / (min(decodes) / steps)
