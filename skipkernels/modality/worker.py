"""What runs batches: the interface of a device in this process, of another process or of a remote replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from skipkernels.modality.strategy import Inputs, Strategy


class Worker(Protocol):
    """Runs one batch at a time; a batch that has started is never interrupted."""

    async def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        """One output per request, in order.

        Raises:
            WorkerLost: the device, process or machine is gone; ``recover`` is called before the next batch.
            Exception: the model failed on this batch; the worker itself can go on.
        """
        ...

    async def recover(self) -> None:
        """After ``WorkerLost``: returns once batches can run again. Whatever it raises retires this worker."""
        ...

    async def close(self) -> None:
        """Releases its resources. No batch is running."""
        ...
