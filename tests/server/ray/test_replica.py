"""A replica by itself, in this process: what it sends for a batch."""

import asyncio

from skipkernels.chat.chat import Chat, Completion, Message
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.server.ray.events import ModelFailure, Outputs, Pieces
from skipkernels.server.ray.replica import Replica
from tests.server.http.fakes import EchoModel

TEXT = Strategy(("text",))


def inputs(text: str) -> Inputs:
    return {"text": (Chat((Message("user", (text,)),)), text)}


async def collect(
    replica: Replica, *texts: str, leave: tuple[int, ...] = (), unread: tuple[int, ...] = ()
) -> tuple[list[str], Outputs | ModelFailure]:
    """The text of each request and what came at the end; ``leave`` gives up after the first pieces; nobody streams
    ``unread``."""
    said = [""] * len(texts)
    streamed = [position not in unread for position in range(len(texts))]
    async for event in replica.run([inputs(text) for text in texts], TEXT, streamed):
        if not isinstance(event, Pieces):
            return said, event
        for position, text in event.texts:
            said[position] += text
        if leave:
            await replica.give_up(leave)
    raise AssertionError("a batch ends with outputs or a failure")


def test_the_text_of_a_batch_comes_before_its_outputs() -> None:
    said, end = asyncio.run(collect(Replica(EchoModel), "a b c", "d e", "be mute now"))
    assert said == ["a b c ", "d e ", ""]
    assert isinstance(end, Outputs)
    assert [output.text for output in end.outputs] == ["a b c ", "d e ", "be mute now "]
    assert all(isinstance(output, Completion) for output in end.outputs)


def test_what_nobody_streams_is_not_sent_before_the_end() -> None:
    said, end = asyncio.run(collect(Replica(EchoModel), "a b c", "d e", unread=(0,)))
    assert said == ["", "d e "]
    assert isinstance(end, Outputs)
    assert [output.text for output in end.outputs] == ["a b c ", "d e "]


def test_a_model_that_fails_is_no_lost_worker() -> None:
    async def run() -> None:
        replica = Replica(EchoModel)
        _, end = await collect(replica, "fail")
        assert end == ModelFailure("ValueError('it was told to fail')")
        said, _ = await collect(replica, "go on")
        assert said == ["go on "]

    asyncio.run(run())


def test_who_left_is_not_answered_to_the_end() -> None:
    model = EchoModel(word_s=0.02)
    said, end = asyncio.run(collect(Replica(lambda: model), "word " * 200, "a b c d e", leave=(0,)))
    assert said[1] == "a b c d e "
    assert len(said[0].split()) < 50
    assert isinstance(end, Outputs)
