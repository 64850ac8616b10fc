"""Generated clips: how much of the label each modality gives away, and how hard it is to find."""

import numpy as np
import pytest

from skipkernels.workloads.fusion.clips import FEATURES, MODALITIES, Clips, ClipSource, _directions

SOURCE = ClipSource()


def evidence(clips: Clips, modality: str, told_apart: bool) -> np.ndarray:
    """What somebody sees who knows the directions: the mean over the speaker's frames, or over all."""
    along, speaker = _directions(MODALITIES.index(modality))
    frames = clips.frames[modality].astype(np.float64)
    speaks = (frames @ speaker > 0.0) if told_apart else np.ones(frames.shape[:-1])
    return (frames @ along * speaks).sum(-1) / speaks.sum(-1)


def test_the_best_accuracy_is_that_of_who_knows_the_directions() -> None:
    clips = SOURCE.draw(4_000, np.random.default_rng(1))  # 128,000 labels: a deviation is 0.0013
    seen = [evidence(clips, modality, told_apart=True) for modality in MODALITIES]
    for modality, values in zip(MODALITIES, seen, strict=True):
        assert ((values > 0) == clips.labels).mean() == pytest.approx(SOURCE.best_accuracy(modality), abs=0.005)
    covariance = np.cov([values[clips.labels == 1] for values in seen])
    weights = np.linalg.solve(covariance, [SOURCE.strengths[modality] for modality in MODALITIES])
    pooled = sum(weight * values for weight, values in zip(weights, seen, strict=True))
    assert ((pooled > 0) == clips.labels).mean() == pytest.approx(SOURCE.best_accuracy(*MODALITIES), abs=0.005)


def test_frames_have_to_be_told_apart() -> None:
    clips = SOURCE.draw(2_000, np.random.default_rng(2))
    for modality in MODALITIES:
        mixed = ((evidence(clips, modality, told_apart=False) > 0) == clips.labels).mean()
        assert mixed < SOURCE.best_accuracy(modality) - 0.02


def test_the_profile_is_near_the_originals() -> None:
    reported = {MODALITIES: 0.7432, ("audio",): 0.7233, ("video",): 0.6600}
    for modalities, accuracy in reported.items():
        assert SOURCE.best_accuracy(*modalities) == pytest.approx(accuracy, abs=0.02)
    assert SOURCE.frames["video"] == 4 * SOURCE.frames["audio"]


def test_clips_have_their_shapes_and_can_be_drawn_again() -> None:
    first, again, other = (SOURCE.draw(3, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.labels.shape == (3, SOURCE.segments)
    assert set(np.unique(first.labels)) == {0, 1}
    for modality, frames in SOURCE.frames.items():
        assert first.frames[modality].shape == (3, SOURCE.segments, frames, FEATURES)
        assert first.frames[modality].dtype == np.float32
        assert (first.frames[modality] == again.frames[modality]).all()
    assert (first.labels != other.labels).any()
