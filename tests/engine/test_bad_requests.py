"""Bad requests: an error that names what is wrong, and an engine that goes on as if it had not been asked."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels import _C
from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import Engine
from skipkernels.errors import DeviceError, ModelError, PolicyError, RequestError, SkipkernelsError
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.skipping.policy import FixedPolicy, SkipPolicy
from tests.models import VOCAB, random_prompt, tiny_engine, tiny_module

PROMPT = random_prompt(6)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return tiny_engine(module=tiny_module(), tokenizer=tokenizer, max_seq_len=32, max_batch_size=2)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt was given"),
        ([PROMPT] * 3, {}, "3 prompts do not fit max_batch_size=2; split them"),
        (random_prompt(33), {}, "the prompt has 33 tokens, the cache holds max_seq_len=32"),
        ([PROMPT, random_prompt(33)], {}, "the prompt has 33 tokens"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (PROMPT, {"max_new_tokens": 28}, "28 does not fit: 6 prompt tokens leave room for 27"),
        ([1, VOCAB], {}, f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([-1], {}, "token id -1 is outside"),
        (PROMPT, {"stop": "end"}, "stop must be a list of strings, got one string"),
        (PROMPT, {"stop": [""]}, "a stop string must not be empty"),
        (PROMPT, {"eos_token_ids": range(17)}, "17 end-of-sequence tokens; at most 16"),
        (PROMPT, {"sampling": [SamplingParams()] * 2}, "2 sampling parameters for 1 prompts"),
        (PROMPT, {"policy": FixedPolicy((9,))}, r"fixed layer 9 is outside 0\.\.3"),
        (PROMPT, {"policy": SkipPolicy(cold_start=3)}, "leave nothing to skip"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_is_fine(
    engine: Engine, prompts: Any, options: dict[str, Any], message: str
) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=8)[0].token_ids
    with pytest.raises(SkipkernelsError, match=message):
        engine.generate(prompts, **options)
    assert not engine.state.active.any()
    assert engine.generate(PROMPT, max_new_tokens=8)[0].token_ids == expected


@pytest.mark.parametrize(("prompt", "options"), [("text", {}), (PROMPT, {"stop": ["x"]}), ([{"role": "user"}], {})])
def test_text_needs_a_tokenizer(prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="needs a tokenizer, and this model was loaded without one; pass token ids"):
        tiny_engine().generate(prompt, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"device": "gpu"}, DeviceError, "unknown device 'gpu'; use 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:first"}, DeviceError, "unknown device 'cuda:first'"),
        ({"device": "cuda:99"}, DeviceError, "device 'cuda:99' is not usable: "),
        ({"device": "cuda", "executor": "cpu"}, DeviceError, "the cpu executor does not run on device 'cuda'"),
        ({"executor": "graph"}, DeviceError, "the graph executor does not run on device 'cpu'"),
        ({"kernels": "triton"}, DeviceError, "kernels='triton' is for device 'cuda', got device 'cpu'"),
        ({"loop": "while"}, DeviceError, "loop='while' is for device 'cuda', got device 'cpu'"),
        ({"conditional": "else"}, DeviceError, "unknown conditional 'else'; use one of auto, predicate, if_node"),
        ({"debug": True}, DeviceError, "debug is for device 'cuda', got device 'cpu'"),
        ({"dtype": "fp8"}, ModelError, "unknown dtype 'fp8'; use one of fp32, bf16, fp16"),
        ({"executor": "gpu"}, DeviceError, "unknown executor 'gpu'; use one of auto, cpu, reference, graph"),
        ({"max_batch_size": 17}, RequestError, r"max_batch_size must lie in 1\.\.16, got 17"),
        ({"max_batch_size": 0}, RequestError, r"max_batch_size must lie in 1\.\.16, got 0"),
        ({"max_seq_len": 0}, RequestError, r"max_seq_len must lie in 1\.\.512 \(the model's maximum\), got 0"),
        ({"max_seq_len": 513}, RequestError, "got 513"),
        ({"policy": SkipPolicy(cold_end=4)}, PolicyError, "leave nothing to skip"),
        ({"num_threads": -1}, DeviceError, "num_threads must be at least 1, got -1"),
        ({"num_threads": 0}, DeviceError, "num_threads must be at least 1, got 0"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_and_the_module_stays_usable(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    module = tiny_module()
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(kind, match=message):
        tiny_engine(module=module, **options)
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses, "the module was packed first"


def test_another_instruction_set_is_refused() -> None:
    engine = tiny_engine()
    program = engine.executor_for(engine.policy).program
    with pytest.raises(DeviceError, match=r"'sse9' is not usable on this processor; usable: auto, .*generic"):
        CpuExecutor(program, engine.state, num_threads=1, isa="sse9")


def test_an_instruction_outside_the_program_is_refused() -> None:
    engine = tiny_engine()
    with pytest.raises(ValueError, match=r"instruction 99 is outside 0\.\."):
        engine.executor_for(engine.policy).run_instruction(99)


@pytest.mark.parametrize("model", ["/no/such/folder", "./no-such-folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        Engine.from_pretrained(model)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        '{"model_type": "no such family"}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "head_dim": 7}',
        '{"model_type": "llama", "num_attention_heads": 0}',
    ],
)
def test_an_unreadable_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        Engine.from_pretrained(tmp_path)


def test_the_widest_instruction_set_is_taken() -> None:
    engine = tiny_engine()
    executor = engine.executor_for(engine.policy)
    assert isinstance(executor, CpuExecutor)
    assert executor.isa == _C.usable_isas()[0]
    assert _C.usable_isas()[-1] == "generic"
