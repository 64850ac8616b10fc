"""Multimodal checkpoints load by folder, in the layouts they are published in; what is missing is named."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from skipkernels.chat.multimodal.families import load_module, load_processor
from skipkernels.chat.multimodal.multimodal_model import MultimodalModel
from skipkernels.chat.text_model import exact_match
from skipkernels.errors import ModelError
from skipkernels.modality.strategy import Strategy
from skipkernels.skipping.policy import DensePolicy
from tests.chat.multimodal.chats import chat_of, stock_tokens
from tests.chat.multimodal.test_multimodal_model import tokens_of
from tests.models import randomise, tiny_module
from tests.multimodal import MULTIMODAL, omni_config, tiny_multimodal

WEIGHTS = "model.safetensors"
OPTIONS = {"max_seq_len": 256, "num_threads": 1}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved("llava", tmp_path)


def saved(family: str, folder: Path) -> Path:
    module, processor = tiny_multimodal(family)
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_folder_decodes_as_transformers(family: str, tmp_path: Path) -> None:
    model = MultimodalModel.from_pretrained(saved(family, tmp_path), {0.0: DensePolicy()}, exact_match, **OPTIONS)
    assert model.name == str(tmp_path)
    assert model.dtype == "fp32"
    expected = stock_tokens(*tiny_multimodal(family), chat_of(model.modalities))
    assert tokens_of(model, chat_of(model.modalities), Strategy(model.modalities)) == expected


def test_the_dtype_can_be_chosen(checkpoint: Path) -> None:
    stored = tiny_multimodal("llava")[0].to(torch.bfloat16)
    stored.save_pretrained(checkpoint)
    for dtype, expected in ((None, "bf16"), ("fp32", "fp32")):
        model = MultimodalModel.from_pretrained(checkpoint, {0.0: DensePolicy()}, exact_match, dtype=dtype, **OPTIONS)
        assert model.dtype == expected


def test_the_thinker_is_taken_out_of_a_whole_omni_checkpoint(tmp_path: Path) -> None:
    whole = Qwen2_5OmniForConditionalGeneration(
        Qwen2_5OmniConfig(thinker_config=omni_config().to_dict(), enable_audio_output=False)
    )
    randomise(whole).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_5_omni"
    thinker = dict(load_module(tmp_path, None, "cpu").named_parameters())
    expected = dict(whole.thinker.named_parameters())
    assert thinker.keys() == expected.keys()
    assert all(torch.equal(thinker[name], parameter) for name, parameter in expected.items())


def test_a_processor_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    """Settings of images and sounds in one file, the template in JSON."""
    _, processor = tiny_multimodal("qwen2.5 omni")
    processor.tokenizer.save_pretrained(tmp_path)
    settings = {
        **processor.image_processor.to_dict(),
        **processor.feature_extractor.to_dict(),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5OmniProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    loaded = load_processor(tmp_path, "qwen2_5_omni")
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_processor.patch_size == 4
    assert loaded.feature_extractor.feature_size == 16
    assert loaded.audio_token_id == processor.audio_token_id


def load(folder: Path) -> MultimodalModel:
    return MultimodalModel.from_pretrained(folder, {0.0: DensePolicy()}, exact_match, **OPTIONS)


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    """transformers would fill its place with random numbers."""
    module, _ = tiny_multimodal("llava")
    state = {name: tensor for name, tensor in module.state_dict().items() if "projector.linear_1.bias" not in name}
    module.save_pretrained(checkpoint, state_dict=state)
    with pytest.raises(ModelError, match=r"tensor '.*linear_1\.bias' is missing from the checkpoint"):
        load(checkpoint)


def test_a_truncated_checkpoint_is_refused(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(checkpoint)


def test_a_checkpoint_without_a_processor_is_refused(checkpoint: Path) -> None:
    (checkpoint / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="its processor cannot be loaded"):
        load(checkpoint)


def test_a_processor_without_a_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="its processor has no chat template"):
        load(checkpoint)


def test_a_model_of_text_is_refused_before_it_is_read(tmp_path: Path) -> None:
    tiny_module().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="'llama' is not served as a multimodal model; served are llava, qwen2_audio"):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load(Path("/no/such/folder"))
