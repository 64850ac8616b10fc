"""Jobs that cannot be served are refused when they are made."""

import math
from typing import Any

import pytest

from skipkernels.modality.errors import JobError
from skipkernels.modality.job import Job, Request
from tests.modality.profiles import job

AUDIO = Request({"audio": 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests": []}, "at least one request"),
        ({"requests": [AUDIO, Request({"video": 0})]}, "must hold the same modalities"),
        ({"deadline_ms": math.nan}, "deadline_ms must be a positive number of milliseconds, got nan"),
        ({"deadline_ms": 0.0}, "got 0.0"),
        ({"deadline_ms": -1}, "got -1"),
        ({"deadline_ms": "soon"}, "got 'soon'"),
        ({"deadline_ms": True}, "got True"),
        ({"min_accuracy": math.nan}, r"min_accuracy must lie in \[0, 1\], got nan"),
        ({"min_accuracy": 1.01}, "got 1.01"),
        ({"min_accuracy": -0.5}, "got -0.5"),
        ({"min_accuracy": None}, "got None"),
    ],
)
def test_an_impossible_job_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        Job(**{"requests": [AUDIO], **settings})


@pytest.mark.parametrize("work", [0.0, -1.0, math.nan, math.inf, "much"])
def test_work_is_a_positive_number(work: Any) -> None:
    with pytest.raises(JobError, match="work must be a positive multiple"):
        Request({"audio": 0}, work)


def test_a_request_needs_a_modality() -> None:
    with pytest.raises(JobError, match="holds no modality"):
        Request({})


def test_an_unknown_modality_is_named_beside_the_known_ones() -> None:
    with pytest.raises(JobError, match="unknown modality 'video'; this model takes audio, text"):
        job(1, 5.0).check_modalities(["text", "audio"])
    job(1, 5.0).check_modalities(["video", "text", "audio"])


def test_inputs_stay_out_of_messages() -> None:
    assert "secret" not in repr(Job([Request({"audio": "secret"})]))
