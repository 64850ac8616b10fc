"""A copy of the model in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from skipkernels.chat.chat import ChatModel
from skipkernels.chat.progress import ChatInputs, SampledToken
from skipkernels.errors import RequestError
from skipkernels.modality.profile import Profile
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.server.ray.events import Description, ModelFailure, Outputs, Pieces


class Replica:
    """A deployment. The model runs in a thread, so that the process can answer calls meanwhile.

    Args:
        load: makes the model; called in this process.
    """

    def __init__(self, load: Callable[[], ChatModel]) -> None:
        self._model = load()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="skipkernels-model")
        self._running: list[_Sender] = []

    async def ping(self) -> None:
        """Returns once the model is loaded."""

    async def describe(self) -> Description:
        model = self._model
        return Description(
            name=model.name,
            fingerprint=model.fingerprint,
            device=model.device,
            dtype=model.dtype,
            modalities=tuple(model.modalities),
            strategies=tuple(model.strategies),
            format=model.format,
        )

    async def profile(self, measure: Callable[[ChatModel], Profile]) -> Profile:
        """``measure`` of the model, while nothing else runs on it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, measure, self._model)

    async def run(
        self, batch: Sequence[Inputs], strategy: Strategy, streamed: Sequence[bool]
    ) -> AsyncIterator[Pieces | Outputs | ModelFailure]:
        """Runs a batch: yields the text of the ``streamed`` requests as it is generated, and at the end its outputs or
        failure."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        senders = self._running = [_Sender(loop, queue, position, wanted) for position, wanted in enumerate(streamed)]
        watched = [ChatInputs(inputs, sender) for inputs, sender in zip(batch, senders, strict=True)]
        running = loop.run_in_executor(self._thread, self._model.run, watched, strategy)
        running.add_done_callback(lambda _: queue.put_nowait(None))
        while (text := await queue.get()) is not None:
            texts = [text]
            while not queue.empty() and (text := queue.get_nowait()) is not None:
                texts.append(text)
            yield Pieces(tuple(texts))
            if text is None:
                break
        try:
            yield Outputs(tuple(await running))
        except RequestError as error:
            yield ModelFailure(str(error), refused=True)
        except Exception as error:
            yield ModelFailure(repr(error))

    async def give_up(self, positions: Sequence[int]) -> None:
        """Marks answers of the running batch that nobody waits for any more."""
        for position in positions:
            self._running[position].given_up = True


class _Sender:
    """Sends the progress of one request out of this process."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[tuple[int, str] | None],
        position: int,
        streamed: bool,
    ) -> None:
        self.streamed = streamed
        self._loop = loop
        self._queue = queue
        self._position = position
        self.given_up = False

    def restart(self) -> None:
        """Nothing to do: the sender of a batch restarts the progress itself."""

    def add(self, text: str, logprobs: Sequence[SampledToken] = ()) -> None:
        if text and self.streamed:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (self._position, text))
