"""Strategies that are measured while a server is idle join it one by one."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.chat_profile import Effort, dense_profile
from skipkernels.chat.skip_levels import policies_of_levels
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.cli.builtin_text import documentation
from skipkernels.cli.serve_profile import UNMEASURED, IdleProfiling, kept_profile
from skipkernels.modality.profile import Profile
from skipkernels.modality.profile_file import load_profile
from skipkernels.server.http.service import Service
from skipkernels.skipping.policy import SkipPolicy
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
    kept = load_profile(kept_profile(model), model=model)
    assert kept.strategies == adopted[-1].strategies
    assert kept.strategies[0].promised_accuracy == 1.0
