"""Synthetic profiles for simulations. Their times are assumptions, not those of any hardware."""

from __future__ import annotations

from skipkernels.modality.profile import Profile, StrategyProfile, Timing
from skipkernels.modality.strategy import Strategy

# TVLT's tokens: a frame of 224 x 224 or a spectrogram of 1024 x 128 in patches of 16 x 16 (its published configuration)
_VIDEO_TOKENS = 8 * 14 * 14
_AUDIO_TOKENS = 64 * 8
# accuracies as reported by MOSEL (arXiv 2310.18481) for TVLT on CMU-MOSEI sentiment
_REPORTED = {
    Strategy(("audio", "video")): (_AUDIO_TOKENS + _VIDEO_TOKENS, 0.7432),
    Strategy(("audio",)): (_AUDIO_TOKENS, 0.7233),
    Strategy(("video",)): (_VIDEO_TOKENS, 0.6600),
}


def tvlt_mosei(
    *,
    ms_per_token: float = 0.016,
    ms_per_batch: float = 4.0,
    p95_over_median: float = 1.02,
    samples: int = 4659,
    max_batch_size: int = 32,
) -> Profile:
    """The original's workload: accuracies as reported, times assumed proportional to tokens plus a constant.

    Full modality has 2,080 tokens, audio alone 512: 4.06 times fewer. All arguments are assumptions; with the defaults
    one request takes 37 ms with all modalities and 12 ms with audio alone.

    Args:
        samples: size of the validation set behind the accuracies; the more, the closer promises are to them.
    """
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= max_batch_size]
    entries = []
    for strategy, (tokens, accuracy) in _REPORTED.items():
        medians = {size: ms_per_batch + ms_per_token * tokens * size for size in sizes}
        timings = tuple(Timing(size, median_ms, median_ms * p95_over_median) for size, median_ms in medians.items())
        entries.append(StrategyProfile(strategy, timings, accuracy * samples, samples))
    return Profile(
        model="TVLT on CMU-MOSEI",
        fingerprint="synthetic",
        device="none",
        dtype="none",
        strategies=tuple(entries),
        source="synthetic: accuracies reported by arXiv 2310.18481, times assumed from token counts, not measured",
    )
