"""serving_profile.json: a profile on disk, with a version, bound to a model, a device and a dtype."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skipkernels.modality.errors import ProfileError, StrategyError
from skipkernels.modality.profile import Profile, StrategyProfile, Timing
from skipkernels.modality.step_times import StepTimes
from skipkernels.modality.strategy import ModalityModel, Strategy
from skipkernels.support.files import read_document

FORMAT = "skipkernels.serving_profile"
VERSION = 1


def save_profile(path: str | Path, profile: Profile) -> None:
    Path(path).write_text(json.dumps(_to_document(profile), indent=2) + "\n")


def load_profile(path: str | Path, *, model: ModalityModel | None = None) -> Profile:
    """Reads a profile; with ``model``, only one that was made on that model, device and dtype.

    Raises:
        ProfileError: unreadable, another format or version, or another model's.
    """
    document = read_document(path, "serving profile", FORMAT, (VERSION,), ProfileError)
    try:
        profile = _from_document(document)
        if model is not None:
            profile.check(model)
    except (ProfileError, StrategyError) as error:
        raise ProfileError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path}: a field is missing or of the wrong type ({error!r})") from error
    return profile


def _to_document(profile: Profile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": profile.model,
        "model_fingerprint": profile.fingerprint,
        "device": profile.device,
        "dtype": profile.dtype,
        "source": profile.source,
        "strategies": [
            {
                "strategy": entry.strategy.name,
                "score_sum": entry.score_sum,
                "samples": entry.samples,
                "exact": entry.exact,
                "kl": entry.kl,
                "steps": None if entry.steps is None else asdict(entry.steps),
                "timings": [
                    {
                        "batch_size": timing.batch_size,
                        "median_ms": timing.median_ms,
                        "p95_ms": timing.p95_ms,
                        "peak_memory_bytes": timing.peak_memory_bytes,
                    }
                    for timing in entry.timings
                ],
            }
            for entry in profile.strategies
        ],
    }


def _from_document(document: dict[str, Any]) -> Profile:
    return Profile(
        model=document["model"],
        fingerprint=document["model_fingerprint"],
        device=document["device"],
        dtype=document["dtype"],
        source=document["source"],
        strategies=tuple(
            StrategyProfile(
                strategy=Strategy.parse(entry["strategy"]),
                timings=tuple(Timing(**timing) for timing in entry["timings"]),
                score_sum=entry["score_sum"],
                samples=entry["samples"],
                exact=entry.get("exact", False),  # files of earlier releases have none, nor a KL nor steps
                kl=entry.get("kl"),
                steps=_steps(entry.get("steps")),
            )
            for entry in document["strategies"]
        ),
    )


def _steps(document: dict[str, Any] | None) -> StepTimes | None:
    if document is None:
        return None
    return StepTimes(**document | {"decode_ms": tuple((rows, ms) for rows, ms in document["decode_ms"])})
