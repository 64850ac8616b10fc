"""The profile of a served model: from a file, measured before the server listens, or in its idle time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from skipkernels.errors import SkipkernelsError
from skipkernels.support.console import err

if TYPE_CHECKING:
    from skipkernels.chat.text_model import TextModel
    from skipkernels.chat.when_idle import WhenIdle
    from skipkernels.modality.profile import Profile, StrategyProfile
    from skipkernels.modality.strategy import Strategy
    from skipkernels.server.http.service import Service


UNMEASURED = "strategies are still to be measured"
"""In what a profile says of itself while others are to follow."""
_MADE = "in-slots"  # another word where profiles are measured in another way


def kept_profile(model: TextModel) -> Path:
    """Where the profile of a model, measured on this machine, is kept between runs."""
    from skipkernels.chat.neuron_levels import cache_folder

    threads = model.engine.execution.num_threads
    key = f"{model.fingerprint}-{model.device}-{model.dtype}-{model.engine.max_batch_size}x{threads}"
    return cache_folder() / "profiles" / f"{key.replace(':', '_')}-{_MADE}.json"


def measure_levels(model: TextModel, texts: list[str], idle: WhenIdle | None = None) -> None:
    """Finds the thresholds of the model's open levels, and keeps them."""
    from skipkernels.chat.neuron_levels import keep_policies, neuron_policies

    policies = neuron_policies(model.engine, texts, model.open_levels, idle)
    model.offer(policies)
    keep_policies(model.engine, policies)


def needless(profile: Profile) -> list[str]:
    """What is said of each strategy that the server does not choose by itself, whatever runs beside a request."""
    from skipkernels.modality.profile import WORTH

    lines = []
    for entry in profile.strategies:
        if profile.offered_at(entry):
            continue
        better = profile.frontier(entry.strategy.modalities, sharing=1)[0]
        line = (
            f"{entry.strategy} is not chosen by the server: it takes {entry.median_ms(1):.0f} ms, {better.strategy} "
            f"takes {better.median_ms(1):.0f} and promises no less, and beside other requests it does not save "
            f"{100 * WORTH:.0f} % either"
        )
        level = entry.strategy.skip_level
        lines.append(f"{line}; a request may ask for skip_level {level:g}" if level else line)
    return lines


class IdleProfiling:
    """Profiles a text model while it serves, whenever nobody asks it anything. Each strategy joins when it is measured,
    and when all are, the profile is kept for the next start.

    Args:
        first: the profile that is served with until then.
        texts: what to profile on.
    """

    def __init__(self, model: TextModel, first: Profile, texts: Callable[[], list[str]]) -> None:
        from skipkernels.chat.when_idle import WhenIdle

        self._model = model
        self._first = first
        self._texts = texts
        self._service: Service | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = WhenIdle(lambda: self._service is not None and self._service.busy)
        self._thread = threading.Thread(target=self._run, name="skipkernels-profile", daemon=True)

    def start(self, service: Service) -> None:
        """Called in the server's event loop."""
        self._service, self._loop = service, asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._idle.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        from skipkernels.chat.when_idle import Stopped
        from skipkernels.modality.profile_file import save_profile

        texts, profile = self._texts(), None
        try:
            if self._model.open_levels:
                measure_levels(self._model, texts, self._idle)
            for profile in self._profiles(texts):
                self._adopt(profile)
        except Stopped:
            return
        except SkipkernelsError as error:
            self._adopt(replace(profile or self._first, measuring=False))
            err.print(f"[yellow]not all strategies are served, for some were not measured ({error})[/]")
            return
        assert profile is not None, "the dense model is a strategy"
        path = kept_profile(self._model)
        with contextlib.suppress(OSError):  # a read-only home: it is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            save_profile(path, profile)
        number = len(profile.strategies)
        what = f"{number} strategies" if number > 1 else "1 strategy"
        err.print(f"{what} measured in idle time, kept in {path}", soft_wrap=True)
        for line in needless(profile):
            err.print(line, soft_wrap=True)

    def _profiles(self, texts: list[str]) -> Iterator[Profile]:
        """One more strategy in each. Every one is timed beside the dense model, in turns, so that what else the machine
        does is no part of the difference."""
        from skipkernels.chat.chat_profile import IDLE, profile_of_texts

        model = self._model
        dense, *others = model.strategies
        entries: dict[Strategy, StrategyProfile] = {}
        for strategy in others or [dense]:
            seen = model.only([dense] if strategy == dense else [dense, strategy])
            profile = profile_of_texts(seen, texts, IDLE, model.engine.max_batch_size, idle=self._idle)
            entries |= {entry.strategy: entry for entry in profile.strategies}
            known = tuple(entries[strategy] for strategy in model.strategies if strategy in entries)
            missing = len(model.strategies) - len(known)
            source = f"{profile.source}; {missing} {UNMEASURED}" if missing else profile.source
            yield replace(profile, strategies=known, source=source, measuring=bool(missing))

    def _adopt(self, profile: Profile) -> None:
        assert self._loop is not None, "it is started in an event loop"
        assert self._service is not None, "it is started for a service"
        service, named = self._service, replace(profile, model=self._service.profile.model)
        with contextlib.suppress(RuntimeError):  # the server has just ended
            self._loop.call_soon_threadsafe(service.adopt, named)
