"""Decoding: the prompts of one call, decoded together, for callers with a loop of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skipkernels.decoding.generation import Generation
from skipkernels.decoding.handle import Handle
from skipkernels.decoding.loop import DecodeLoop


class Decoding:
    """Handles that are waited for together."""

    def __init__(self, loop: DecodeLoop, handles: Sequence[Handle]) -> None:
        self._loop = loop
        self.rows = list(handles)

    @property
    def running(self) -> bool:
        return any(row.running for row in self.rows)

    def step(self, max_steps: int) -> None:
        """Decodes up to ``max_steps`` tokens more of every row that runs, in as few calls of the executor as can be."""
        wanted = {row: len(row.token_ids) + max_steps for row in self.rows}
        while missing := [count - len(row.token_ids) for row, count in wanted.items() if row.running]:
            if max(missing) <= 0:
                return
            self._loop.step(max(missing))

    def steps(self) -> Iterator[None]:
        """Decodes token by token until no row runs; the device need not wait for the caller between two tokens."""
        for row in self.rows:
            row.streamed = True
        try:
            while self.running:
                had = sum(len(row.token_ids) for row in self.rows)
                while self.running and sum(len(row.token_ids) for row in self.rows) == had:
                    self._loop.step()
                yield
        finally:
            self.end()

    def end(self) -> None:
        """Cancels what still runs."""
        for row in self.rows:
            row.cancel(ended_ok=True)

    def results(self) -> list[Generation]:
        self._loop.finish(self.rows)
        return [row.result() for row in self.rows]
