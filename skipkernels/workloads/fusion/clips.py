"""Generated clips of audio and video, on which the fusion classifier is trained, profiled and served.

A clip has segments, and each segment has a sentiment, negative or positive. Both modalities carry noisy evidence of it:

    evidence_m = strength_m * (+1 or -1) + noise_m,   noise_m standard normal, correlated between the modalities

Frames carry the evidence along one direction in feature space. Only half of a segment's frames show the speaker, which
a second direction marks; the other half carry evidence of somebody else. So a classifier has to find the frames of a
segment, select the speaker's, and weigh one modality against the other.

The best possible accuracy is known, see ``ClipSource.best_accuracy``. The defaults put it near what MOSEL reports of
TVLT on CMU-MOSEI: 0.743 with both, 0.723 with audio alone, 0.660 with video alone (arXiv 2310.18481).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

MODALITIES = ("audio", "video")
FEATURES = 16

Frames = npt.NDArray[np.float32]

_FRAME_NOISE = 0.2
_DIRECTIONS_SEED = 7  # fixed: the same directions for all draws


@dataclass(frozen=True)
class Clips:
    """Some clips.

    Args:
        frames: by modality, f32 [clips, segments, frames, FEATURES].
        labels: i64 [clips, segments], 1 for positive.
    """

    frames: Mapping[str, Frames]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ClipSource:
    """Draws clips.

    Args:
        segments: of a clip.
        frames: of a segment, by modality; even numbers.
        strengths: of the evidence, by modality.
        correlation: of the noise in audio and video.
    """

    segments: int = 32
    frames: Mapping[str, int] = field(default_factory=lambda: {"audio": 2, "video": 8})
    strengths: Mapping[str, float] = field(default_factory=lambda: {"audio": 0.605, "video": 0.43})
    correlation: float = 0.25

    def draw(self, clips: int, rng: np.random.Generator) -> Clips:
        labels = rng.integers(0, 2, (clips, self.segments))
        sign = 2.0 * labels - 1.0
        covariance = [[1.0, self.correlation], [self.correlation, 1.0]]
        noise = rng.multivariate_normal([0.0, 0.0], covariance, (clips, self.segments))
        frames = {}
        for number, modality in enumerate(MODALITIES):
            strength = self.strengths[modality]
            shape = (clips, self.segments, self.frames[modality])
            other = strength * rng.choice([-1.0, 1.0], shape[:2]) + rng.standard_normal(shape[:2])
            evidence = (strength * sign + noise[..., number])[..., None]
            speaks = rng.permuted(np.broadcast_to(np.arange(shape[-1]) % 2, shape), axis=-1)
            carried = np.where(speaks, evidence, other[..., None])
            evidence_direction, speaker_direction = _directions(number)
            drawn = carried[..., None] * evidence_direction + (2.0 * speaks - 1.0)[..., None] * speaker_direction
            drawn += _FRAME_NOISE * rng.standard_normal(drawn.shape)
            frames[modality] = drawn.astype(np.float32)
        return Clips(frames, labels)

    def best_accuracy(self, *modalities: str) -> float:
        """The accuracy of the optimal classifier: it weighs evidence by the inverse covariance, and is right with the
        probability that a standard normal is below mean / deviation of the weighted sum."""
        chosen = [MODALITIES.index(modality) for modality in modalities]
        spoken = [self.frames[modality] / 2 for modality in MODALITIES]
        covariance = np.array([[1.0, self.correlation], [self.correlation, 1.0]])
        covariance += np.diag([_FRAME_NOISE**2 / frames for frames in spoken])
        strengths = np.array([self.strengths[modality] for modality in modalities])
        distance = strengths @ np.linalg.solve(covariance[np.ix_(chosen, chosen)], strengths)
        return NormalDist().cdf(float(np.sqrt(distance)))


def _directions(modality: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Orthogonal unit vectors: the directions of the evidence and of the speaker."""
    drawn = np.random.default_rng([_DIRECTIONS_SEED, modality]).standard_normal((FEATURES, 2))
    evidence, speaker = np.linalg.qr(drawn)[0].T
    return evidence, speaker
