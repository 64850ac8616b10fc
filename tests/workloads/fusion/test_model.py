"""The classifier on the engine: what transformers would answer, and what each strategy costs in accuracy."""

import numpy as np
import pytest
import torch

from skipkernels.errors import PolicyError
from skipkernels.modality.profiler import measure_profile
from skipkernels.modality.strategy import Strategy
from skipkernels.workloads.fusion.clips import MODALITIES
from skipkernels.workloads.fusion.model import FusionModel, Prediction, samples_of
from skipkernels.workloads.fusion.network import FusionNetwork, label_of
from tests.workloads.fusion.conftest import SOURCE

LEVELS = (0.0, 0.2)
SAMPLES = samples_of(SOURCE.draw(300, np.random.default_rng(11)))


@pytest.fixture(scope="module")
def model(network: FusionNetwork) -> FusionModel:
    return FusionModel(network, LEVELS, max_batch_size=8, num_threads=1)


def greedy(network: FusionNetwork, inputs: dict[str, np.ndarray], modalities: tuple[str, ...]) -> list[int]:
    """Tokens by transformers' own forward, one label after the other."""
    frames = {modality: torch.from_numpy(inputs[modality])[None] for modality in modalities}
    tokens: list[int] = []
    with torch.inference_mode():
        for segment in range(SOURCE.segments):
            before = [label_of(token, place) for place, token in enumerate(tokens)]
            labels = torch.tensor([[*before, 0]])  # the last one is not looked at
            tokens.append(int(network(frames, labels)[0, segment].argmax()))
    return tokens


@pytest.mark.parametrize("modalities", [MODALITIES, ("audio",), ("video",)])
def test_dense_answers_are_transformers(
    model: FusionModel, network: FusionNetwork, modalities: tuple[str, ...]
) -> None:
    answers = model.run([sample.inputs for sample in SAMPLES[:8]], Strategy(modalities))
    for answer, sample in zip(answers, SAMPLES, strict=False):
        tokens = greedy(network, dict(sample.inputs), modalities)
        assert answer.labels == tuple(label_of(token, segment) for segment, token in enumerate(tokens))
        assert answer.skip_ratio == 0.0


def test_a_modality_that_is_left_out_has_no_tokens_and_is_not_looked_at(model: FusionModel) -> None:
    inputs = dict(SAMPLES[0].inputs)
    lengths = {
        modalities: len(model.prompt(inputs, Strategy(modalities)).token_ids)
        for modalities in (MODALITIES, ("audio",), ("video",))
    }
    assert lengths == {MODALITIES: 4 * 6 + 1, ("audio",): 4 * 2 + 1, ("video",): 4 * 4 + 1}
    (with_video,) = model.run([inputs], Strategy(("audio",)))
    (without,) = model.run([{"audio": inputs["audio"]}], Strategy(("audio",)))
    assert with_video == without


def test_a_row_of_a_batch_is_answered_as_alone(model: FusionModel) -> None:
    batch = [sample.inputs for sample in SAMPLES[:5]]
    for strategy in model.strategies:
        together = model.run(batch, strategy)
        assert together == [model.run([inputs], strategy)[0] for inputs in batch]


def test_modalities_and_levels_make_the_strategies(model: FusionModel) -> None:
    assert [strategy.name for strategy in model.strategies] == [
        "audio+video@0",
        "audio+video@0.2",
        "audio@0",
        "audio@0.2",
        "video@0",
        "video@0.2",
    ]


def test_accuracy_and_skipping_are_what_the_strategies_say(model: FusionModel) -> None:
    profile = measure_profile(model, SAMPLES, batch_sizes=(1, 8), rounds=2, memory=False)
    best = {one.strategy: SOURCE.best_accuracy(*one.strategy.modalities) for one in profile.strategies}
    for one in profile.strategies:
        assert one.accuracy == pytest.approx(best[one.strategy], abs=0.06)  # 1,200 labels, and a minimal training
        (answer,) = model.run([SAMPLES[0].inputs], one.strategy)
        held = 0.5 / SOURCE.segments + one.strategy.skip_level / SOURCE.segments  # half an FFN and the dense first
        assert answer.skip_ratio == pytest.approx(one.strategy.skip_level, abs=held + 0.1)
    both, audio, video = (profile[Strategy(modalities)].accuracy for modalities in (MODALITIES, ("audio",), ("video",)))
    assert both > audio > video
    for modalities in (MODALITIES, ("audio",), ("video",)):
        loss = profile[Strategy(modalities)].accuracy - profile[Strategy(modalities, 0.2)].accuracy
        assert abs(loss) < 0.03


def test_the_score_is_the_share_of_right_labels(model: FusionModel) -> None:
    assert model.score(Prediction((1, 0, None, 1), 0.0), (1, 1, 0, 1)) == 0.5


def test_another_encoder_or_level_is_another_model(model: FusionModel, network: FusionNetwork) -> None:
    assert FusionModel(network, LEVELS).fingerprint == model.fingerprint
    assert FusionModel(network, (0.0, 0.1)).fingerprint != model.fingerprint
    with torch.no_grad():
        network.segments.weight[0, 0] += 1.0
        changed = FusionModel(network, LEVELS).fingerprint
        network.segments.weight[0, 0] -= 1.0
    assert changed != model.fingerprint


def test_an_impossible_level_is_refused(network: FusionNetwork) -> None:
    with pytest.raises(PolicyError, match=r"target_ratio 0\.9 cannot be held"):
        FusionModel(network, (0.0, 0.9))
