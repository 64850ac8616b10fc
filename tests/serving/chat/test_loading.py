"""A name and options become a model that chats, also in another process."""

import pickle
from pathlib import Path

import pytest

from skipkernels.errors import ModelError, PolicyError
from skipkernels.policy import DensePolicy, FixedPolicy, SkipPolicy
from skipkernels.policy_file import save_policy
from skipkernels.serving.chat.loading import ChatModelLoader, policies_of_levels
from skipkernels.serving.chat.text_model import TextModel
from tests.models import byte_tokenizer, tiny_module

BASE = SkipPolicy(threshold=0.8, span=2, cold_start=0, warmup_tokens=3)
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
    assert policies[0.2] == SkipPolicy(threshold=0.8, span=2, cold_start=0, warmup_tokens=3, target_ratio=0.2)


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


def test_a_loader_travels_and_loads(checkpoint: Path) -> None:
    loader = ChatModelLoader("tiny", str(checkpoint), (0.0, 0.2), None, OPTIONS)
    model = pickle.loads(pickle.dumps(loader))()
    assert isinstance(model, TextModel)
    assert (model.name, model.device, model.dtype) == ("tiny", "cpu", "fp32")
    assert [strategy.name for strategy in model.strategies] == ["text@0", "text@0.2"]
    assert model.fingerprint == loader().fingerprint


def test_another_models_policy_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    own = ChatModelLoader("tiny", str(checkpoint), (0.0, 0.2), None, OPTIONS)().fingerprint.partition("-")[0]
    for fingerprint in (own, "0123456789abcdef"):
        save_policy(tmp_path / f"{fingerprint}.json", BASE, fingerprint=fingerprint, measured={})
    ChatModelLoader("tiny", str(checkpoint), (0.0, 0.2), str(tmp_path / f"{own}.json"), OPTIONS)()
    with pytest.raises(PolicyError, match="calibrate"):
        ChatModelLoader("tiny", str(checkpoint), (0.0, 0.2), str(tmp_path / "0123456789abcdef.json"), OPTIONS)()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        ChatModelLoader("tiny", str(tmp_path / "nowhere"), (0.0,), None, OPTIONS)()
