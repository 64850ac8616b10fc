"""The classifier as a module, its training, and its files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skipkernels.errors import ModelError
from skipkernels.workloads.fusion.clips import MODALITIES
from skipkernels.workloads.fusion.network import FusionNetwork, label_of
from skipkernels.workloads.fusion.train import train_into
from skipkernels.workloads.fusion.trainer import SUBSETS, Schedule, _positions, train
from tests.workloads.fusion.conftest import SHAPE, SOURCE

SHORT = Schedule(steps=4, clips=2)


def logits(network: FusionNetwork, modalities: tuple[str, ...], clips: int = 3) -> torch.Tensor:
    drawn = SOURCE.draw(clips, np.random.default_rng(3))
    with torch.inference_mode():
        return network(
            {modality: torch.from_numpy(drawn.frames[modality]) for modality in modalities},
            torch.from_numpy(drawn.labels),
        )


def test_the_same_seed_trains_the_same_weights() -> None:
    first, again, other = (train(SOURCE, SHORT, seed, SHAPE).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_a_network_survives_its_files(network: FusionNetwork, tmp_path: Path) -> None:
    network.save(tmp_path)
    loaded = FusionNetwork.load(tmp_path)
    assert loaded.shape == network.shape
    for modalities in SUBSETS:
        assert torch.equal(logits(loaded, modalities), logits(network, modalities))


@pytest.mark.parametrize("missing", ["fusion.json", "encoders.safetensors", "decoder/model.safetensors"])
def test_a_folder_without_a_part_is_refused(network: FusionNetwork, tmp_path: Path, missing: str) -> None:
    network.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match="holds no fusion classifier"):
        FusionNetwork.load(tmp_path)


def test_encoders_of_another_width_are_refused(network: FusionNetwork, tmp_path: Path) -> None:
    network.save(tmp_path)
    shape = (tmp_path / "fusion.json").read_text()
    (tmp_path / "fusion.json").write_text(shape.replace('"hidden": 32', '"hidden": 64'))
    with pytest.raises(ModelError, match="holds no fusion classifier"):
        FusionNetwork.load(tmp_path)


def test_a_token_is_a_label_of_its_segment_only(network: FusionNetwork) -> None:
    labels = torch.tensor([[0, 1, 1, 0]])
    tokens = network.label_tokens(labels)[0].tolist()
    assert [label_of(token, segment) for segment, token in enumerate(tokens)] == [0, 1, 1, 0]
    assert [label_of(token, segment) for segment, token in enumerate(tokens[1:])] == [None] * 3
    assert [label_of(token, 0) for token in range(3)] == [None] * 3


def test_frames_that_were_left_out_leave_gaps_in_the_positions() -> None:
    rng = np.random.default_rng(0)
    whole = _positions(SOURCE, MODALITIES, SOURCE.frames, rng)
    assert whole.tolist() == list(range(4 * (2 + 4) + 4))
    few = _positions(SOURCE, ("video",), {"video": 2}, rng).tolist()
    assert few == sorted(few)
    assert [position // 4 for position in few[:8]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert few[8:] == [16, 17, 18, 19]


def test_gaps_in_the_positions_hide_nothing(network: FusionNetwork) -> None:
    """transformers would take them for the beginnings of other sequences."""
    drawn = SOURCE.draw(2, np.random.default_rng(3))
    frames, labels = torch.from_numpy(drawn.frames["audio"]), torch.from_numpy(drawn.labels)
    positions = torch.arange(0, 3 * (4 * 2 + 4), 3)
    with torch.inference_mode():
        before = network({"audio": frames}, labels, positions)
        frames[:, 0] += 1.0
        after = network({"audio": frames}, labels, positions)
    assert (before[:, 0] != after[:, 0]).any()


def test_evidence_fades_and_clips_grow() -> None:
    schedule = Schedule(steps=100, faint_from=0.5, whole_from=0.9, warmup=10)
    factors = [schedule.strengthened(step) for step in range(100)]
    assert factors[0] == 4.0
    assert factors == sorted(factors, reverse=True)
    assert (factors[49] > 1.0, factors[50]) == (True, 1.0)
    assert (schedule.whole(89), schedule.whole(90)) == (False, True)
    rates = [schedule.rate(step) for step in range(100)]
    assert max(rates) == rates[9] == rates[50] == schedule.learning_rate
    assert 0.0 < rates[99] < rates[75] < rates[51] < rates[50]


def test_dropped_ffns_change_the_training_only() -> None:
    seen: list[float] = []
    for share in (0.0, 0.5):
        trained = train(SOURCE, replace(SHORT, dropped_ffns=share), 1, SHAPE, after_step=seen.append)
        assert torch.equal(logits(trained, ("audio",)), logits(trained, ("audio",)))
    assert seen[:4] != seen[4:]


def test_the_script_writes_what_can_be_loaded(tmp_path: Path) -> None:
    train_into(tmp_path / "new" / "folder", Schedule(steps=2, clips=1), seed=0, shape={"intermediate": 32})
    shape = FusionNetwork.load(tmp_path / "new" / "folder").shape
    assert (shape.segments, shape.max_frames, shape.intermediate) == (32, 320, 32)
