"""serving_profile.json: what is written is read, and anything else refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skipkernels.modality.errors import ProfileError
from skipkernels.modality.profile_file import load_profile, save_profile
from skipkernels.modality.step_times import StepTimes
from tests.modality.profiles import entry, profile_of

PROFILE = profile_of(entry("audio+video@0.25", 0.9, 10.0, request_bytes=1000, spread=1.5), entry("audio", 0.8, 2.0))


def changed(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_profile(tmp_path / "serving_profile.json", PROFILE)
    return tmp_path / "serving_profile.json"


def test_a_profile_survives_its_file(path: Path) -> None:
    assert load_profile(path) == PROFILE


def test_times_of_steps_survive_it_too(tmp_path: Path) -> None:
    steps = StepTimes(((1, 8.0), (4, 12.5)), positions=38, position_ms=0.001, prompt_ms=0.4, prompt_rows=16.0)
    profile = profile_of(replace(entry("audio", 0.8, 2.0), steps=steps))
    save_profile(tmp_path / "profile.json", profile)
    assert load_profile(tmp_path / "profile.json") == profile
    document = json.loads((tmp_path / "profile.json").read_text())
    document["strategies"][0]["steps"]["decode_ms"] = [[2, 1.0]]
    with pytest.raises(ProfileError, match="times of steps"):
        load_profile(changed(tmp_path / "profile.json", strategies=document["strategies"]))
    document["strategies"][0]["steps"]["decode_ms"] = [[1, 2, 3]]
    with pytest.raises(ProfileError, match="a field is missing or of the wrong type"):
        load_profile(changed(tmp_path / "profile.json", strategies=document["strategies"]))


def test_it_is_refused_for_another_model(path: Path) -> None:
    model = SimpleNamespace(
        name="toy",
        fingerprint="toy-1",
        device="cpu",
        dtype="fp32",
        strategies=tuple(one.strategy for one in PROFILE.strategies),
    )
    assert load_profile(path, model=model) == PROFILE  # type: ignore[arg-type]
    model.device = "cuda:0"
    with pytest.raises(ProfileError, match=r"serving_profile.json: .* for device cpu, this model's is cuda:0"):
        load_profile(path, model=model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "something"}, "is not a serving profile"),
        ({"version": 2}, "has version 2, this release reads version 1"),
        ({"strategies": []}, "at least one strategy"),
        ({"strategies": [{}]}, "a field is missing"),
        ({"strategies": [3]}, "a field is missing or of the wrong type"),
        ({"strategies": [{"strategy": "audio@2", "timings": [], "score_sum": 1, "samples": 1}]}, "not a strategy like"),
        (
            {"strategies": [{"strategy": "a", "timings": [{"x": 1}], "score_sum": 1, "samples": 1}]},
            "a field is missing",
        ),
    ],
)
def test_a_wrong_document_is_refused(path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        load_profile(changed(path, **fields))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"format":')
    with pytest.raises(ProfileError, match="is not JSON"):
        load_profile(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ProfileError, match="is not a serving profile"):
        load_profile(tmp_path / "list.json")
