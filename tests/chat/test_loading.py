"""A name and options become a model that chats, also in another process."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from skipkernels.chat.loading import ChatModelLoader
from skipkernels.chat.text_model import TextModel, exact_match
from skipkernels.engine import Engine
from skipkernels.errors import ModelError, PolicyError
from skipkernels.skipping.policy import FixedPolicy, NeuronPolicy, Policy, SkipPolicy
from skipkernels.skipping.policy_file import save_policy
from tests.gguf_files import Type, write_gguf
from tests.models import byte_tokenizer, tiny_module
from tests.multimodal import tiny_multimodal

LAYERS = 8
BASE = SkipPolicy(threshold=0.8, span=2, first_dense_layers=0, warmup_tokens=3)
OPTIONS = {"max_seq_len": 64, "max_batch_size": 2, "num_threads": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_module(num_hidden_layers=LAYERS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loader_of(
    path: Path, *policy_files: Path, levels: tuple[float, ...] | None = (0.0, 0.2), **options: object
) -> ChatModelLoader:
    files = tuple(map(str, policy_files))
    return ChatModelLoader("tiny", str(path), levels, files, exact_match, OPTIONS | options)


def saved(file: Path, policy: Policy, fingerprint: str | None = None, **held_out: float) -> Path:
    save_policy(file, policy, fingerprint=fingerprint or "", measured={"held_out": held_out} if held_out else {})
    return file


@pytest.fixture(scope="module")
def fingerprint(checkpoint: Path) -> str:
    return loader_of(checkpoint, levels=(0.0,))().fingerprint.partition("-")[0]


def test_a_loader_travels_and_loads(checkpoint: Path, fingerprint: str, tmp_path: Path) -> None:
    loader = loader_of(checkpoint, saved(tmp_path / "policy.json", BASE, fingerprint))
    model = pickle.loads(pickle.dumps(loader))()
    assert isinstance(model, TextModel)
    assert (model.name, model.device, model.dtype) == ("tiny", "cpu", "fp32")
    assert [strategy.name for strategy in model.strategies] == ["text@0", "text@0.2"]
    assert model.fingerprint == loader().fingerprint


def test_a_multimodal_checkpoint_loads_by_its_family(tmp_path: Path) -> None:
    module, processor = tiny_multimodal("llava")
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    dense = loader_of(tmp_path, levels=None, max_seq_len=256)()
    assert [strategy.name for strategy in dense.strategies] == ["image+text@0", "text@0"]
    policy = saved(tmp_path / "policy.json", BASE, dense.fingerprint.partition("-")[0])
    model = pickle.loads(pickle.dumps(loader_of(tmp_path, policy, levels=None, max_seq_len=256)))()
    assert model.name == "tiny"
    assert [strategy.name for strategy in model.strategies] == [
        "image+text@0",
        "image+text@0.1",
        "image+text@0.2",
        "image+text@0.3",
        "text@0",
        "text@0.1",
        "text@0.2",
        "text@0.3",
    ]


def test_another_models_policy_file_is_refused(checkpoint: Path, fingerprint: str, tmp_path: Path) -> None:
    loader_of(checkpoint, saved(tmp_path / "own.json", BASE, fingerprint))()
    with pytest.raises(PolicyError, match="calibrate"):
        loader_of(checkpoint, saved(tmp_path / "other.json", BASE, "0123456789abcdef"))()


def text_model(loader: ChatModelLoader) -> TextModel:
    model = loader()
    assert isinstance(model, TextModel)
    return model


def test_without_a_policy_the_levels_are_neurons_that_are_measured_later(checkpoint: Path) -> None:
    model = text_model(loader_of(checkpoint, levels=None))
    assert [strategy.name for strategy in model.strategies] == ["text@0"]
    assert model.open_levels == (0.1, 0.2, 0.3)
    assert model.engine.weights.neuron_rows
    before = model.fingerprint
    policy = NeuronPolicy(product_thresholds=(0.1,) * LAYERS, target_ratio=0.2)
    model.offer({0.2: policy})
    assert [strategy.name for strategy in model.strategies] == ["text@0", "text@0.2"]
    assert (model.open_levels, model.policy(model.strategies[1])) == ((0.1, 0.3), policy)
    assert model.fingerprint != before


def test_who_wants_dense_steps_only_gets_their_weights(checkpoint: Path) -> None:
    model = text_model(loader_of(checkpoint, levels=(0.0,)))
    assert model.open_levels == ()
    assert not model.engine.weights.neuron_rows


@pytest.mark.parametrize("dtype", [None, "bf16", "q4_0"])
def test_neurons_of_block_formats_are_left_out_where_levels_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str | None
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_module(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96), Type.Q8_0)
    options = {"dtype": dtype, "tokenizer": byte_tokenizer()}
    model = text_model(loader_of(file, levels=None, **options))
    assert bool(model.open_levels) == model.engine.weights.neuron_rows == (dtype == "bf16")
    assert ("served dense" in caplog.text) == (dtype != "bf16")
    if dtype is None:
        asked = text_model(loader_of(file, **options))
        assert asked.open_levels == (0.2,)
        assert asked.engine.weights.neuron_rows


def test_a_gguf_of_floats_is_not_quantised(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_module(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96), Type.BF16)
    assert text_model(loader_of(file, levels=None, tokenizer=byte_tokenizer())).open_levels == (0.1, 0.2, 0.3)


def test_levels_beyond_the_reach_of_quantised_weights_are_refused(tmp_path: Path) -> None:
    """Of Q4_0 the scales of 32 neurons of down_proj are read as long as one of them is."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_module(num_hidden_layers=LAYERS, hidden_size=128, intermediate_size=96), Type.Q4_0)
    loader = loader_of(file, levels=(0.0, 0.65), tokenizer=byte_tokenizer())
    with pytest.raises(PolicyError, match=r"skip level 0\.65 cannot be held: .* take 0\.6"):
        loader()
    neurons = NeuronPolicy(gate_thresholds=(0.1,) * LAYERS, target_ratio=0.65)
    engine = Engine.from_pretrained(file, neuron_rows=True, tokenizer=byte_tokenizer())
    with pytest.raises(PolicyError, match=r"target_ratio 0\.65 cannot be held: .* less than 0\.6"):
        engine.plan_of(neurons)
    assert engine.plan_of(replace(neurons, target_ratio=0.6)) is not None


def test_of_experts_levels_are_measured_but_for_those_in_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_module("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = text_model(loader_of(tmp_path, levels=None))
    assert model.open_levels == (0.1, 0.2, 0.3)
    assert model.engine.weights.neuron_rows
    model = text_model(loader_of(tmp_path, levels=None, dtype="q8_0"))
    assert (model.open_levels, [strategy.name for strategy in model.strategies]) == ((), ["text@0"])
    reason = "single neurons of experts in q8_0 cannot be left out"
    assert f"served dense, without skip levels: {reason}" in caplog.text
    with pytest.raises(PolicyError, match=rf"skip level 0\.2 needs a policy file \(--policy\): {reason}"):
        loader_of(tmp_path, levels=(0.0, 0.2), dtype="q8_0")()


def test_a_file_of_neurons_is_held_at_every_level(checkpoint: Path, fingerprint: str, tmp_path: Path) -> None:
    neurons = NeuronPolicy(product_thresholds=(0.1,) * LAYERS, warmup_tokens=3)
    model = text_model(loader_of(checkpoint, saved(tmp_path / "neurons.json", neurons, fingerprint), levels=None))
    assert model.engine.weights.neuron_rows
    held = {strategy.skip_level: model.policy(strategy) for strategy in model.strategies}
    assert [getattr(policy, "target_ratio", 0) for policy in held.values()] == list(held) == [0.0, 0.1, 0.2, 0.3]


def test_each_of_several_files_is_a_level(checkpoint: Path, fingerprint: str, tmp_path: Path) -> None:
    neurons = NeuronPolicy(product_thresholds=(0.1,) * LAYERS)
    files = (
        saved(tmp_path / "blocks.json", FixedPolicy((2, 3)), fingerprint, skip_ratio=0.2483),
        saved(tmp_path / "neurons.json", neurons, fingerprint, skip_ratio=0.1),
    )
    model = text_model(loader_of(checkpoint, *files, levels=None))
    assert [strategy.name for strategy in model.strategies] == ["text@0", "text@0.1", "text@0.25"]
    assert model.policy(model.strategies[1]) == neurons
    assert [one.name for one in loader_of(checkpoint, *files, levels=(0.0, 0.1))().strategies] == ["text@0", "text@0.1"]
    with pytest.raises(PolicyError, match=r"share of 0.3; they are for 0, 0.1, 0.25"):
        loader_of(checkpoint, *files, levels=(0.0, 0.3))()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        loader_of(tmp_path / "nowhere")()
