"""What runs requests: the interface of a device in this process, of another process or of a remote replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class SlotWorker(Protocol):
    """Runs up to ``slots`` requests at the same time, which join and leave its steps one by one."""

    slots: int

    async def answer(self, inputs: Inputs, strategy: Strategy, deadline_ms: float) -> Any:
        """The output of one request, once it is ready; raises as ``Worker.run`` does.

        Args:
            deadline_ms: on the scheduler's clock; what comes first where not everything fits a step.
        """
        ...

    def move(self, inputs: Inputs, strategy: Strategy) -> None:
        """Lets a running request go on with another skip level; nothing where it has ended."""
        ...

    def drop(self, inputs: Inputs) -> None:
        """Ends a running request early: nobody waits for its output."""
        ...

    async def recover(self) -> None:
        """As ``Worker.recover``."""
        ...

    async def close(self) -> None:
        """Releases its resources. No request is running."""
        ...
