"""Strategies that are measured while a server is idle join it one by one."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.chat_profile import Effort, dense_profile
from skipkernels.chat.skip_levels import policies_of_levels
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.cli.builtin_text import documentation
from skipkernels.cli.serve_profile import UNMEASURED, IdleProfiling, kept_profile, needless
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.profile import Profile
from skipkernels.modality.profile_file import load_profile
from skipkernels.server.http.service import Service
from skipkernels.skipping.policy import SkipPolicy
from tests.modality.test_worth import ALONE_ONLY, DENSE, SLOWER, profile_with, timed
from tests.models import tiny_engine, tiny_module

LEVELS = (0.0, 0.2, 0.4)


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:1]])
def test_strategies_join_one_by_one(
    levels: tuple[float, ...],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("skipkernels.chat.chat_profile.IDLE", Effort(2, 2, (1,), memory=False))
    skipping = SkipPolicy(threshold=0.5, span=2, first_dense_layers=0, warmup_tokens=1)
    engine = tiny_engine(module=tiny_module(num_hidden_layers=10), tokenizer=tokenizer, max_seq_len=200)
    model = TextModel("tiny", engine, policies_of_levels(skipping, levels), shared_prefix)
    first = dense_profile(model, engine.max_batch_size)
    adopted: list[Profile] = []

    async def serve() -> None:
        fake: Any = SimpleNamespace(profile=first, busy=False, adopt=adopted.append)
        profiling = IdleProfiling(model, first, lambda: ["\n\n".join(documentation()[:200])])
        profiling.start(cast(Service, fake))
        while not kept_profile(model).exists():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(profiling.stop)
        await asyncio.sleep(0)

    asyncio.run(serve())
    names = [[entry.strategy.skip_level for entry in profile.strategies] for profile in adopted]
    assert names == [list(levels[:count]) for count in range(min(2, len(levels)), len(levels) + 1)]
    assert [UNMEASURED in profile.source for profile in adopted] == [True] * (len(adopted) - 1) + [False]
    assert [profile.measuring for profile in adopted] == [True] * (len(adopted) - 1) + [False]
    kept = load_profile(kept_profile(model), model=model)
    assert kept.strategies == adopted[-1].strategies
    assert kept.strategies[0].promised_accuracy == 1.0


@dataclass
class Idle:
    """A model whose profile is made up, profiled in the idle time of a server that does nothing else."""

    model: TextModel
    adopted: list[Profile]

    def profile(self, until: Callable[[], bool]) -> None:
        first = replace(dense_profile(self.model, 1), measuring=True)

        async def serve() -> None:
            fake: Any = SimpleNamespace(profile=first, busy=False, adopt=self.adopted.append)
            profiling = IdleProfiling(self.model, first, lambda: ["a text"])
            profiling.start(cast(Service, fake))
            while not until():
                await asyncio.sleep(0.01)
            await asyncio.to_thread(profiling.stop)
            await asyncio.sleep(0)

        asyncio.run(serve())


@pytest.fixture
def idle(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Idle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    skipping = SkipPolicy(threshold=0.5, span=2, first_dense_layers=0, warmup_tokens=1)
    engine = tiny_engine(module=tiny_module(num_hidden_layers=10), tokenizer=tokenizer, max_seq_len=200)
    return Idle(TextModel("tiny", engine, policies_of_levels(skipping, (0.0, 0.2)), shared_prefix), [])


def test_a_level_that_saves_no_time_is_said_to_be_asked_for_only(
    idle: Idle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slower(seen: TextModel, *_: object, **__: object) -> Profile:
        dense, skipping = timed("text@0", 1.0, DENSE), timed("text@0.2", 0.23, SLOWER)
        return Profile(seen.name, seen.fingerprint, seen.device, seen.dtype, (dense, skipping))

    monkeypatch.setattr("skipkernels.chat.chat_profile.profile_of_texts", slower)
    idle.profile(until=kept_profile(idle.model).exists)
    (line,) = needless(idle.adopted[-1])
    assert line == (
        "text@0.2 is not chosen by the server: it takes 542 ms, text@0 takes 476 and promises no less, and beside "
        "other requests it does not save 3 % either; a request may ask for skip_level 0.2"
    )
    assert line in capsys.readouterr().err.replace("\n", " ")
    kept = load_profile(kept_profile(idle.model), model=idle.model)
    assert [entry.strategy.skip_level for entry in kept.frontier(("text",))] == [0.0]
    assert not needless(profile_with({size: ms / 2 for size, ms in DENSE.items()}))
    assert not needless(profile_with(ALONE_ONLY))


def test_profiling_that_fails_is_over(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Profile:
        raise ProfileError("the text is too short")

    monkeypatch.setattr("skipkernels.chat.chat_profile.profile_of_texts", fail)
    idle.profile(until=lambda: bool(idle.adopted))
    assert [profile.measuring for profile in idle.adopted] == [False]


def test_one_strategy_is_said_to_be_one(
    idle: Idle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dense(seen: TextModel, *_: object, **__: object) -> Profile:
        return Profile(seen.name, seen.fingerprint, seen.device, seen.dtype, (timed("text@0", 1.0, DENSE),))

    monkeypatch.setattr("skipkernels.chat.chat_profile.profile_of_texts", dense)
    idle.profile(until=kept_profile(idle.model).exists)
    assert "1 strategy measured" in capsys.readouterr().err
