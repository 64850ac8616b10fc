"""A replica as the scheduler's worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from skipkernels.chat.progress import Progress, progress_of
from skipkernels.errors import RequestError
from skipkernels.modality.errors import WorkerLost
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.server.ray.events import ModelFailure, Outputs, Pieces

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_LOOK_S = 0.05  # between two looks at who has left
_RETRY_S = 0.2  # between two calls to a replica that does not answer


class ReplicaWorker:
    """A ``Worker``.

    Args:
        replica: a deployment of ``Replica`` with one replica.
        restart_s: how long Ray may take to restart it, which loads the model.
    """

    def __init__(self, replica: DeploymentHandle, restart_s: float) -> None:
        self._replica = replica
        self._restart_s = restart_s
        self._abandoned = asyncio.Event()

    async def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        progress = [progress_of(inputs) for inputs in batch]
        for one in progress:
            one.restart()
        watching = asyncio.create_task(self._tell_who_leaves(progress))
        try:
            plain = [dict(inputs) for inputs in batch]
            events = self._replica.options(stream=True).run.remote(plain, strategy, [one.streamed for one in progress])
            async for event in cast(AsyncIterator[Any], events):
                if isinstance(event, Outputs):
                    return event.outputs
                if isinstance(event, ModelFailure):
                    raise (RequestError if event.refused else RuntimeError)(event.reason)
                assert isinstance(event, Pieces)
                for position, text in event.texts:
                    progress[position].add(text)
        except (RayError, RayServeException) as error:
            raise WorkerLost(_first_line(error)) from error
        finally:
            watching.cancel()
        raise WorkerLost("the replica ended a batch without its outputs")

    async def _tell_who_leaves(self, progress: Sequence[Progress]) -> None:
        """Also of requests that are not streamed, from which nothing comes before their end."""
        given_up: set[int] = set()
        while len(given_up) < len(progress):
            await asyncio.sleep(_LOOK_S)
            leaving = {position for position, one in enumerate(progress) if one.given_up} - given_up
            if leaving:
                given_up |= leaving
                self._replica.give_up.remote(sorted(leaving))

    async def recover(self) -> None:
        """Waits until Ray has restarted the replica.

        Raises:
            TimeoutError: it did not restart in time.
            WorkerLost: ``abandon`` was called.
        """
        coming = asyncio.create_task(self._answers())
        abandoned = asyncio.create_task(self._abandoned.wait())
        try:
            async with asyncio.timeout(self._restart_s):
                await asyncio.wait({coming, abandoned}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            coming.cancel()
            abandoned.cancel()
        if self._abandoned.is_set():
            raise WorkerLost("the service shut down before the replica restarted")

    def abandon(self) -> None:
        """Ends a ``recover`` that waits."""
        self._abandoned.set()

    async def close(self) -> None:
        """The replica ends with its deployment."""

    async def _answers(self) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        while True:
            try:
                await self._replica.ping.remote()
            except (RayError, RayServeException):
                await asyncio.sleep(_RETRY_S)
            else:
                return


def _first_line(error: Exception) -> str:
    """The first line only: Ray's errors are pages long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
