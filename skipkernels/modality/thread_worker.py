"""Runs the model in this process, in a thread of its own beside the one that accepts jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from skipkernels.modality.strategy import Inputs, ModalityModel, Strategy


class ThreadWorker:
    """A ``Worker``. It is never lost: what the model raises fails the batch only."""

    def __init__(self, model: ModalityModel) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"skipkernels-{model.device}")

    async def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._model.run, batch, strategy)

    async def recover(self) -> None:
        """Nothing to do: a thread is never lost."""

    async def close(self) -> None:
        self._thread.shutdown()
