"""The decisions that are timed are those of full queues."""

from typing import Any

import pytest

from skipkernels.benchmark.serving import decision_time
from skipkernels.benchmark.serving.decision_time import decision_times_ms
from skipkernels.modality.scheduler import Scheduler
from tests.modality.profiles import two_speeds


def test_queues_are_full_and_of_different_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    class Watched(Scheduler):
        def next_batch(self, worker: int) -> Any:
            waiting = self.waiting_requests
            batch = super().next_batch(worker)
            assert batch is not None
            seen.append((waiting, batch.strategy.name))
            return batch

    monkeypatch.setattr(decision_time, "Scheduler", Watched)
    times = decision_times_ms(two_speeds(), "maximize", requests=20, repeats=3)
    assert [len(taken) for taken in times.values()] == [3, 3, 3, 3]
    assert all(ms > 0.0 for taken in times.values() for ms in taken)
    assert {waiting for waiting, _ in seen} == {20}
    assert [strategy for _, strategy in seen][-1] == "audio+video@0"
    assert "audio@0" in {strategy for _, strategy in seen}
