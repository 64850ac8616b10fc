"""Dense decoding is what ``transformers`` decodes, for every family."""

from pathlib import Path

import pytest
import torch

from skipkernels import _C
from skipkernels.decoding.prefill import CHUNK
from skipkernels.engine import Engine
from tests.models import FAMILIES, random_prompt, stock_tokens, tiny_engine, tiny_module
from tests.tolerances import assert_close

NEW_TOKENS = 64
PROMPT = random_prompt(21)  # longer than the windows, so that the prefill slides too

families = pytest.mark.parametrize("family", FAMILIES)
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@families
@tied_or_not
def test_greedy_tokens_of_a_checkpoint_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    module = tiny_module(family, tie_word_embeddings=tied)
    expected = stock_tokens(module, PROMPT, NEW_TOKENS)
    assert len(set(expected)) > 4, "the model repeats itself too much to show anything"

    module.save_pretrained(tmp_path / "single")
    module.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "single").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for folder in ("single", "sharded"):
        engine = tiny_engine(module=tmp_path / folder)
        assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)[0].token_ids == expected


@families
@tied_or_not
@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_greedy_tokens_of_a_module_are_those_of_transformers(family: str, tied: bool, executor: str) -> None:
    module = tiny_module(family, tie_word_embeddings=tied)
    expected = stock_tokens(module, PROMPT, NEW_TOKENS)
    engine = tiny_engine(module=module, executor=executor)
    assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)[0].token_ids == expected


@families
def test_logits_follow_transformers_at_every_step(family: str) -> None:
    module = tiny_module(family)
    with torch.inference_mode():
        tokens = [*PROMPT, *stock_tokens(module, PROMPT, 20)]
        expected = module(torch.tensor([tokens])).logits[0]
    engine = tiny_engine(module=module)
    stream = engine.stream(PROMPT, max_new_tokens=20)
    for position in range(len(PROMPT) - 1, len(PROMPT) + 19):
        next(stream)
        assert_close(engine.state.logits[0], expected[position], "logits after layers, fp32", f"position {position}")


@families
def test_bf16_logits_stay_near_transformers(family: str) -> None:
    module = tiny_module(family, dtype=torch.bfloat16, num_hidden_layers=4)
    exact = tiny_module(family, dtype=torch.bfloat16, num_hidden_layers=4).float()
    with torch.inference_mode():
        rounded_logits = module(torch.tensor([PROMPT])).logits[0, -1].float()
        exact_logits = exact(torch.tensor([PROMPT])).logits[0, -1]
    engine = tiny_engine(module=module)
    assert engine.dtype == "bf16"
    next(engine.stream(PROMPT, max_new_tokens=1))
    logits = engine.state.logits[0]
    assert_close(logits, rounded_logits, "logits after layers, bf16", "against bf16")
    assert_close(logits, exact_logits, "logits after layers, bf16", "against fp32 with the same weights")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_decode_on_both_executors_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    """Token by token the same, but where the processor's own bf16 products round activations: there the logits of the
    first step are near."""
    tiny_module("qwen2", dtype=dtype).save_pretrained(tmp_path)
    native, reference = (tiny_engine(module=tmp_path, executor=name) for name in ("cpu", "reference"))
    if dtype == torch.bfloat16 and _C.usable_isas()[0] == "avx512_bf16":
        for engine in (native, reference):
            engine.generate(PROMPT, max_new_tokens=1)
        assert_close(native.state.logits, reference.state.logits, "logits after layers, bf16", "first step")
        return
    first, second = (engine.generate(PROMPT, max_new_tokens=16)[0].token_ids for engine in (native, reference))
    assert first == second


@pytest.mark.parametrize("past_a_chunk", [0, 1, 2, 6, 70])
def test_prompts_longer_than_a_prefill_chunk_are_cached_whole(past_a_chunk: int) -> None:
    """With 6 tokens in the last chunk, the window of the first decoded token reaches into the chunk before."""
    module = tiny_module("mistral with a sliding window", max_position_embeddings=1200)
    prompt = random_prompt(2 * CHUNK + past_a_chunk)
    engine = tiny_engine(module=module, max_seq_len=1200)
    assert engine.generate(prompt, max_new_tokens=16)[0].token_ids == stock_tokens(module, prompt, 16)


def test_dtype_can_be_chosen(tmp_path: Path) -> None:
    module = tiny_module(dtype=torch.bfloat16)
    module.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, dtype="fp32", num_threads=1)
    assert engine.dtype == "fp32"
    assert engine.generate(PROMPT, max_new_tokens=16)[0].token_ids == stock_tokens(module.float(), PROMPT, 16)
