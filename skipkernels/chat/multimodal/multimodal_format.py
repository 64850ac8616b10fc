"""Turns chats into inputs of multimodal models: a prompt per modality subset, and the tensors of each modality."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels.chat.chat import EXPECTED_NEW_TOKENS, Audio, Chat, Image, Part, modalities_of, modality_of
from skipkernels.chat.grammar import GrammarText, KnownTokens
from skipkernels.chat.text_format import allowed_new_tokens, work_of
from skipkernels.decoding.generation import SamplingParams
from skipkernels.errors import RequestError
from skipkernels.modality.job import Request

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

_MAX_ASPECT = 200  # processors that scale the shorter side would need gigabytes for longer images
_SHORTEST_S = 0.1  # some encoders fail on less, because their output is empty

Subset = tuple[str, ...]
"""Modalities in alphabetical order, as in a ``Strategy``."""


@dataclass(frozen=True)
class MultimodalPrompt:
    """The ``text`` modality of a request: the prompt for each subset that may be kept, and decoding options."""

    token_ids: dict[Subset, tuple[int, ...]]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    grammar: GrammarText | KnownTokens | None = None
    eos_token_ids: tuple[int, ...] | None = None


class MultimodalFormat:
    """A ``ChatFormat``: the processor's chat template, and its tensors by modality.

    Args:
        modalities: what the model takes; ``text`` is one of them and cannot be left out.
        max_seq_len: positions that the model's cache holds.
        prefill_share: what a token of the prompt costs, as a share of a new token.
    """

    has_template = True

    def __init__(
        self, processor: ProcessorMixin, modalities: tuple[str, ...], max_seq_len: int, prefill_share: float
    ) -> None:
        self.modalities = modalities
        self._processor = copy.deepcopy(processor)  # a copy, because the model uses its own in another thread
        self._max_seq_len = max_seq_len
        self._prefill_share = prefill_share
        named = vars(processor).items()
        self._reserved = [token for name, token in named if name.endswith("_token") and isinstance(token, str)]

    def request(self, chat: Chat) -> Request:
        """The request, with separate tensors for each modality, so that a strategy can leave some out. The processor
        runs here, not on the device's thread."""
        given = modalities_of(chat.messages)
        self._check(chat, given)
        media = sorted(given - {"text"})
        token_ids: dict[Subset, tuple[int, ...]] = {}
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for kept in chain.from_iterable(combinations(media, size) for size in range(len(media) + 1)):
            features = self._features(chat, kept)
            token_ids[tuple(sorted((*kept, "text")))] = tuple(features["input_ids"][0].tolist())
            if not kept:
                of_text = set(features)
            elif len(kept) == 1:
                tensors[kept[0]] = {name: features[name] for name in features if name not in of_text}
        prompt_tokens = max(map(len, token_ids.values()))
        new_tokens = allowed_new_tokens(chat.max_new_tokens, prompt_tokens, self._max_seq_len)
        prompt = MultimodalPrompt(token_ids, new_tokens, chat.sampling, chat.stop, chat.grammar)
        work = work_of(prompt_tokens, min(new_tokens, chat.max_new_tokens or EXPECTED_NEW_TOKENS), self._prefill_share)
        return Request({"text": prompt, **tensors}, work=work)

    def _check(self, chat: Chat, given: Collection[str]) -> None:
        if not any(message.text.strip() for message in chat.messages):
            raise RequestError("the messages hold no text; say what to do with the images and recordings")
        if chat.tools:
            raise RequestError("this model calls no tools; leave tools out", param="tools")
        unknown = sorted(set(given) - set(self.modalities))
        if unknown:
            raise RequestError(f"this model does not take {unknown[0]}; it takes {', '.join(self.modalities)}")
        for part in chain.from_iterable(message.parts for message in chat.messages):
            if isinstance(part, Image):
                _check_image(part)
            elif isinstance(part, Audio):
                _check_audio(part, self._processor.feature_extractor.chunk_length)
            elif reserved := next((token for token in self._reserved if token in part), None):
                raise RequestError(
                    f"the text contains {reserved!r}, which this model reserves for images or audio; remove it"
                )

    def _features(self, chat: Chat, kept: Collection[str]) -> dict[str, torch.Tensor]:
        """The processor's tensors for the chat without the images or recordings that are not kept."""
        messages: list[dict[str, Any]] = [
            {
                "role": message.role,
                "content": [self._content(part) for part in message.parts if modality_of(part) in (*kept, "text")],
            }
            for message in chat.messages
        ]
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            features: Any = self._processor.apply_chat_template(messages, add_generation_prompt=True, **options)
        except ImportError:
            raise
        except Exception as error:  # templates and processors raise anything for chats they do not support
            raise RequestError(f"this model's processor refuses this chat: {error}") from error
        return dict(features)

    def _content(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Image):
            from PIL import Image as PillowImage

            return {"type": "image", "image": PillowImage.fromarray(part.pixels)}
        if isinstance(part, Audio):
            return {"type": "audio", "audio": _resampled(part, self._processor.feature_extractor.sampling_rate)}
        return {"type": "text", "text": part}


def _check_image(image: Image) -> None:
    height, width = image.pixels.shape[:2]
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise RequestError(
            f"an image of {width} x {height} pixels is too long and thin; one side may be at most {_MAX_ASPECT} "
            "times the other"
        )


def _check_audio(audio: Audio, most_s: float) -> None:
    seconds = len(audio.samples) / audio.rate_hz
    if not _SHORTEST_S <= seconds <= most_s:
        raise RequestError(
            f"a recording lasts {seconds:.2f} s, this model hears {_SHORTEST_S} to {most_s:g} s; cut it to that"
        )


def _resampled(audio: Audio, rate_hz: int) -> np.ndarray:
    """Resamples to ``rate_hz``: f32 [samples]."""
    from scipy.signal import resample_poly

    if audio.rate_hz == rate_hz:
        return audio.samples
    divisor = np.gcd(audio.rate_hz, rate_hz)
    return resample_poly(audio.samples, rate_hz // divisor, audio.rate_hz // divisor).astype(np.float32)
