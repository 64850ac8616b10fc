"""Any method behind lm-evaluation-harness: it is active in generation and in log-likelihood scoring alike.

    lm = MethodLM(engine, method)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

A log-likelihood is read from a decode by force, token by token as in a generation. A short continuation alone would
hardly skip anything, because a prompt is read in full: so the context is decoded by force too (``decoded_context``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError, SkipkernelsError
from skipkernels.methods.method import Method
from skipkernels.methods.work import Work

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise SkipkernelsError(
        "the harness needs lm-eval, which is not installed; `pip install skipkernels[eval]` brings it"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["MethodLM", "TaskManager", "simple_evaluate"]

_DEFAULT_NEW_TOKENS = 256  # of a generation task that gives no length, as in the harness's own models


class MethodLM(TemplateLM):
    """A method as a model of the harness.

    Args:
        engine: its tokenizer and cache length.
        decoded_context: how many of the context's last tokens are decoded by force; None: all but the first.
    """

    def __init__(self, engine: Engine, method: Method, *, decoded_context: int | None = None) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise RequestError("the harness needs a tokenizer, and this model was loaded without one")
        if decoded_context is not None and decoded_context < 0:
            raise RequestError(f"decoded_context must not be negative, got {decoded_context}")
        self._engine = engine
        self._method = method
        self._decoded_context = decoded_context
        self.tokenizer = engine.tokenizer
        self.work = Work()
        """Of all requests so far."""

    @property
    def eot_token_id(self) -> int:
        token = self._engine.tokenizer.eos_token_id if self._engine.tokenizer else None
        if token is None:
            raise RequestError("this tokenizer has no end-of-sequence token, which the harness needs")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        bos = self._engine.tokenizer.bos_token_id if self._engine.tokenizer else None
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self._engine.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise RequestError("this tokenizer has no chat template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """With the tokenizer's own special tokens, unless the text begins with one already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to its stop strings.

        Raises:
            RequestError: a task wants to sample; methods decode greedily.
        """
        texts = [""] * len(requests)
        for options, places in _by_options(requests).items():
            wanted = normalize_gen_kwargs(json.loads(options), default_max_gen_toks=_DEFAULT_NEW_TOKENS)
            if wanted.get("do_sample"):
                raise RequestError(f"the task wants to sample ({options}); only greedy decoding can be evaluated")
            new_tokens = min(int(wanted["max_gen_toks"]), self.max_length - 1)
            room = self.max_length - new_tokens + 1
            answers = self._method.generate(
                [self.tok_encode(requests[place].args[0])[-room:] for place in places],
                max_new_tokens=new_tokens,
                stop=[text for text in wanted["until"] if text],
            )
            for place, answer in zip(places, answers, strict=True):
                self.work += answer.work
                texts[place] = answer.text
                self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the cache."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            scored = self._loglikelihood_tokens([((text, ""), context, predicted) for context, predicted in windows])
            totals.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation the log-likelihood, and whether greedy decoding would give it."""
        passages = [self._passage(context, continuation) for _, context, continuation in requests]
        results = []
        for (key, _, continuation), reading in zip(requests, self._method.score(passages), strict=True):
            own = slice(-len(continuation), None)
            greedy = reading.argmax[own].tolist() == continuation
            results.append((float(reading.log_probs[own].sum()), greedy))
            self.work += reading.work
            self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def _passage(self, context: list[int], continuation: list[int]) -> Passage:
        """What does not fit the cache is cut off on the left, as in the harness's own models."""
        if len(continuation) > self.max_length:
            raise RequestError(
                f"a continuation of {len(continuation)} tokens does not fit max_seq_len={self.max_length}"
            )
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        given = len(tokens) - len(continuation)
        decoded = given - 1 if self._decoded_context is None else min(self._decoded_context, given - 1)
        return Passage(tuple(tokens), given - decoded)


def _by_options(requests: Sequence[Instance]) -> dict[str, list[int]]:
    """Places of the requests that are decoded alike, and so together."""
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
    return places
