"""A name and options become a model that chats, also in another process."""

import pickle
from pathlib import Path

import pytest

from skipkernels.chat.loading import ChatModelLoader, policies_of_levels, usual_levels
from skipkernels.chat.text_model import TextModel, exact_match
from skipkernels.errors import ModelError, PolicyError
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, SkipPolicy
from skipkernels.skipping.policy_file import save_policy
from tests.models import byte_tokenizer, tiny_module
from tests.multimodal import tiny_multimodal

BASE = SkipPolicy(threshold=0.8, span=2, first_dense_layers=0, warmup_tokens=3)
OPTIONS = {"max_seq_len": 64, "max_batch_size": 2, "num_threads": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_module(num_hidden_layers=8).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_every_level_has_the_base_with_its_ratio() -> None:
    policies = policies_of_levels(BASE, [0.2, 0.0])
    assert list(policies) == [0.0, 0.2]
    assert policies[0.0] == DensePolicy()
    assert policies[0.2] == SkipPolicy(threshold=0.8, span=2, first_dense_layers=0, warmup_tokens=3, target_ratio=0.2)


@pytest.mark.parametrize(
    ("levels", "message"),
    [([], "there must be one"), ([0.1, 0.1], "must differ"), ([1.5], "target_ratio"), ([-0.1], "target_ratio")],
)
def test_impossible_levels_are_refused(levels: list[float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policies_of_levels(BASE, levels)


def test_a_policy_that_holds_no_ratio_has_no_levels() -> None:
    assert policies_of_levels(FixedPolicy((1,)), [0.0]) == {0.0: DensePolicy()}
    with pytest.raises(PolicyError, match="kind 'fixed' holds none"):
        policies_of_levels(FixedPolicy((1,)), [0.0, 0.1])


def test_the_usual_levels_are_those_that_can_be_held() -> None:
    assert usual_levels(SkipPolicy(first_dense_layers=0, last_dense_layers=0), 16) == [0.0, 0.1, 0.2, 0.3]
    assert usual_levels(SkipPolicy(first_dense_layers=4, last_dense_layers=11, span=5), 24) == [0.0, 0.1, 0.2]
    assert usual_levels(FixedPolicy((1,)), 16) == [0.0]
    for level in usual_levels(BASE, 8):
        policies_of_levels(BASE, [level])[level].plan(8)


def loader_of(path: Path, policy_file: Path | None = None) -> ChatModelLoader:
    file = None if policy_file is None else str(policy_file)
    return ChatModelLoader("tiny", str(path), (0.0, 0.2), file, exact_match, OPTIONS)


def test_a_loader_travels_and_loads(checkpoint: Path) -> None:
    loader = loader_of(checkpoint)
    model = pickle.loads(pickle.dumps(loader))()
    assert isinstance(model, TextModel)
    assert (model.name, model.device, model.dtype) == ("tiny", "cpu", "fp32")
    assert [strategy.name for strategy in model.strategies] == ["text@0", "text@0.2"]
    assert model.fingerprint == loader().fingerprint


def test_a_multimodal_checkpoint_loads_by_its_family(tmp_path: Path) -> None:
    module, processor = tiny_multimodal("llava")
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loader = ChatModelLoader("tiny", str(tmp_path), None, None, exact_match, OPTIONS | {"max_seq_len": 256})
    model = pickle.loads(pickle.dumps(loader))()
    assert model.name == "tiny"
    assert [strategy.name for strategy in model.strategies] == [
        "image+text@0",
        "image+text@0.1",
        "image+text@0.2",
        "text@0",
        "text@0.1",
        "text@0.2",
    ]


def test_another_models_policy_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    save_policy(own, BASE, fingerprint=loader_of(checkpoint)().fingerprint.partition("-")[0], measured={})
    save_policy(other, BASE, fingerprint="0123456789abcdef", measured={})
    loader_of(checkpoint, own)()
    with pytest.raises(PolicyError, match="calibrate"):
        loader_of(checkpoint, other)()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        loader_of(tmp_path / "nowhere")()
