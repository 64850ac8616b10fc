"""Text on its way from a model's thread to its reader, also when it begins again."""

import asyncio
import threading

from hypothesis import given
from hypothesis import strategies as st

from skipkernels.chat.progress import ChatInputs, LiveProgress, Unwatched, progress_of


async def read(progress: LiveProgress) -> list[str]:
    pieces = []
    while (piece := await progress.next_piece()) is not None:
        pieces.append(piece.text)
    return pieces


async def handed_on(*answers: list[str]) -> list[str]:
    """What a reader gets of an answer that is begun once for each of ``answers``, in a thread of its own."""
    progress = LiveProgress()

    def model() -> None:
        for pieces in answers:
            progress.restart()
            for piece in pieces:
                progress.add(piece)

    thread = threading.Thread(target=model)
    thread.start()
    await asyncio.to_thread(thread.join)
    progress.end()
    return await read(progress)


def test_pieces_come_in_order_and_empty_ones_do_not() -> None:
    assert asyncio.run(handed_on(["a", "", "bc", "d"])) == ["a", "bc", "d"]


@given(st.text(min_size=1, max_size=20), st.data())
def test_an_answer_that_begins_again_is_handed_on_once(text: str, data: st.DataObject) -> None:
    def cut(whole: str) -> list[str]:
        places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
        return [whole[start:stop] for start, stop in zip([0, *places], [*places, len(whole)], strict=True)]

    first = cut(text[: data.draw(st.integers(0, len(text)))])
    assert "".join(asyncio.run(handed_on(first, cut(text)))) == text


def test_nothing_follows_a_beginning_that_is_not_repeated() -> None:
    assert asyncio.run(handed_on(["one ", "two "], ["one ", "too ", "many "])) == ["one ", "two "]
    assert asyncio.run(handed_on(["one ", "two "], ["one too many "])) == ["one ", "two "]


def test_plain_inputs_have_a_progress_that_nobody_watches() -> None:
    assert isinstance(progress_of({"text": 1}), Unwatched)
    unwatched = Unwatched()
    assert progress_of(ChatInputs({"text": 1}, unwatched)) is unwatched
