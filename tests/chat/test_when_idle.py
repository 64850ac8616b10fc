"""Measurements keep out of the way of requests."""

import pytest

from skipkernels.chat.when_idle import QUIET_S, Stopped, WhenIdle


class Waiting(WhenIdle):
    """On a clock of its own, which goes on where it waits. Somebody asks at the times in ``asked``."""

    def __init__(self, asked: range) -> None:
        self.tenths = 0
        super().__init__(lambda: self.tenths in asked, clock=lambda: self.tenths / 10)

    def pause(self) -> None:
        self.tenths += 1


def test_nobody_is_waited_for_where_nobody_asked() -> None:
    idle = Waiting(range(0))
    idle.wait()
    assert idle.tenths == 0


def test_a_conversation_may_go_on_for_a_while() -> None:
    idle = Waiting(range(7))
    idle.wait()
    assert idle.tenths == 6 + 10 * QUIET_S


def test_a_request_in_pauses_of_another_is_waited_for_too() -> None:
    idle = Waiting(range(0, 40, 8))
    idle.wait()
    assert idle.tenths == 32 + 10 * QUIET_S


def test_who_wants_the_model_is_seen_at_once_and_a_measurement_is_done_again() -> None:
    idle = Waiting(range(3, 5))
    begun: list[int] = []

    def measurement() -> int:
        begun.append(idle.tenths)
        while not idle.wanted and idle.tenths < 20 + begun[0]:
            idle.tenths += 1
        return idle.tenths

    assert idle.measure(measurement) == 20
    assert begun == [0, 14]


def test_nothing_is_waited_for_after_the_end() -> None:
    idle = Waiting(range(1000))
    idle.stop()
    assert idle.wanted
    with pytest.raises(Stopped):
        idle.wait()
    assert idle.tenths == 0
