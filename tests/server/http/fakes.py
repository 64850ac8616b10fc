"""A chat model that repeats what it is told, and ways to reach it."""

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from skipkernels.chat.chat import Chat, Completion, Image
from skipkernels.chat.progress import progress_of
from skipkernels.errors import RequestError
from skipkernels.modality.job import Request
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.strategy import Inputs, Strategy, all_strategies
from skipkernels.modality.thread_worker import ThreadWorker
from skipkernels.server.http.app import create_app
from skipkernels.server.http.backend import Embedded
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.service import Service
from tests.modality.profiles import entry

STRATEGIES = all_strategies(("text", "image", "audio"), (0.0, 0.5), required=("text",))
# more modalities and less skipping are better and dearer; the times leave room for a busy machine
PROFILE = Profile(
    "echo",
    "echo-1",
    "cpu",
    "fp32",
    tuple(
        entry(
            s.name,
            0.7 + 0.1 * len(s.modalities) - 0.1 * s.skip_level,
            1000 * (1 + len(s.modalities) - s.skip_level),
            batch_ms=1000.0,
        )
        for s in STRATEGIES
    ),
)
REACHABLE = max(entry.promised_accuracy for entry in PROFILE.strategies if entry.strategy.modalities == ("text",))


class EchoFormat:
    """Keeps the last message: its words, and the sizes of its pictures and recordings."""

    modalities = ("text", "image", "audio")
    has_template = True

    def request(self, chat: Chat) -> Request:
        inputs: dict[str, Any] = {"text": (chat, chat.messages[-1].text)}
        for part in chat.messages[-1].parts:
            if not isinstance(part, str):
                inputs.setdefault("image" if isinstance(part, Image) else "audio", []).append(part)
        if not chat.messages[-1].text:
            raise RequestError("the messages hold no text; say something")
        return Request(inputs)


class EchoModel:
    """A word takes ``word_s``. Told ``fail``, it raises; told ``mute``, it streams nothing before the end; told
    ``fickle``, it fails once after the first word, and says something else the second time."""

    name = "echo"
    fingerprint = "echo-1"
    device = "cpu"
    dtype = "fp32"
    modalities = EchoFormat.modalities
    strategies = STRATEGIES
    format = EchoFormat()

    def __init__(self, word_s: float = 0.0) -> None:
        self.word_s = word_s
        self.batches: list[tuple[Strategy, list[Inputs]]] = []
        self.words = 0
        self._begun: set[str] = set()

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> list[Completion]:
        self.batches.append((strategy, list(batch)))
        answers = [self._answer(inputs) for inputs in batch]
        for place in range(max(map(len, answers))):
            running = [
                (inputs, answer[place])
                for inputs, answer in zip(batch, answers, strict=True)
                if place < len(answer) and not progress_of(inputs).given_up
            ]
            if not running:
                break
            time.sleep(self.word_s)
            self.words += len(running)
            for inputs, word in running:
                if "mute" not in inputs["text"][1]:
                    progress_of(inputs).add(word)
                self._stumble(inputs["text"][1], batch)
        return [self._completion(inputs, answer, strategy) for inputs, answer in zip(batch, answers, strict=True)]

    def score(self, output: Completion, expected: str) -> float:
        return float(output.text == expected)

    def _answer(self, inputs: Inputs) -> list[str]:
        progress_of(inputs).restart()
        chat, text = inputs["text"]
        if "fail" in text:
            raise ValueError("it was told to fail")
        if text in self._begun and "fickle" in text:
            text = "another answer"
        return [word + " " for word in text.split()][: chat.max_new_tokens]

    def _stumble(self, text: str, batch: Sequence[Inputs]) -> None:
        if ("fickle" in text or "stumble" in text) and text not in self._begun:
            self._begun |= {inputs["text"][1] for inputs in batch}  # nobody in it stumbles again when it is run alone
            raise ValueError("it stumbled")

    def _completion(self, inputs: Inputs, answer: list[str], strategy: Strategy) -> Completion:
        limit = inputs["text"][0].max_new_tokens
        return Completion(
            text="".join(answer),
            finish_reason="length" if len(answer) == limit else "stop",
            prompt_tokens=len(inputs["text"][1].split()),
            new_tokens=len(answer),
            skip_ratio=strategy.skip_level,
            after_first_ms=1.0,
        )


def echo_service(model: EchoModel | None = None, limits: RequestLimits | None = None, **options: Any) -> Service:
    """Options of ``Runtime``, and ``api_key`` and ``strict``."""
    api_key, strict = options.pop("api_key", None), options.pop("strict", False)
    runtime = Runtime(PROFILE, [ThreadWorker(model or EchoModel())], **options)
    return Service(PROFILE, EchoFormat(), Embedded(runtime), limits=limits, api_key=api_key, strict=strict)


@contextlib.asynccontextmanager
async def client_of(service: Service, *, raise_app_exceptions: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """Requests go to the application directly, without a socket."""
    transport = httpx.ASGITransport(app=create_app(service), raise_app_exceptions=raise_app_exceptions)
    async with service, httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def body(text: Any = "one two three", **fields: Any) -> dict[str, Any]:
    """Of a chat completion's request."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


COMPLETIONS = "/v1/chat/completions"
