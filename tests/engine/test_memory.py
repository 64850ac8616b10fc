"""A loaded model takes the memory of its weights and cache, not twice that, and gives it back."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from weakref import ref

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from skipkernels import Engine, SkipPolicy
from skipkernels.errors import RequestError
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import expected_parameters
from tests.models import random_prompt, tiny_engine

CONFIG = LlamaConfig(
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=16000,
    max_position_embeddings=2048,
    eos_token_id=None,
    dtype="bfloat16",
)
# imports and a first product of torch are the baseline; what comes on top belongs to the model
PROGRAM = """
import json, pathlib, re, sys
from skipkernels import Engine
from tests.models import tiny_engine
tiny_engine(num_threads=2).generate([1, 2, 3], max_new_tokens=4)
def peak_bytes():  # getrusage would count the parent's peak too
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
baseline = peak_bytes()
engine = Engine.from_pretrained(sys.argv[1], num_threads=2)
engine.generate(list(range(1, 600)), max_new_tokens=8)
print(json.dumps([peak_bytes() - baseline, engine.weights.nbytes(), engine.state.cache_bytes()]))
"""

PROMPT = random_prompt(5)


def refused(engine: Engine) -> None:
    with suppress(RequestError):
        engine.generate([PROMPT, PROMPT])


def compared(engine: Engine) -> None:
    engine.compare_with_reference(engine.policy)
    engine.generate(PROMPT, max_new_tokens=3)


USES: dict[str, Callable[[Engine], object]] = {
    "loaded": lambda engine: None,
    "generated": lambda engine: engine.generate(PROMPT, max_new_tokens=3, policy=SkipPolicy(threshold=0.5)),
    "streamed": lambda engine: list(engine.stream(PROMPT, max_new_tokens=3)),
    "left in the middle": lambda engine: next(engine.stream(PROMPT, max_new_tokens=3)),
    "submitted": lambda engine: engine.submit(PROMPT, max_new_tokens=3).result(),
    "refused": refused,
    "compared": compared,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_an_engine_goes_when_nobody_holds_it(executor: str, use: str) -> None:
    """Without the garbage collector, which may come late: until then weights and cache would stay in memory."""
    gc.collect()
    gc.disable()
    try:
        engine = tiny_engine(executor=executor)
        USES[use](engine)
        parts = [ref(part) for part in (engine, engine.state, engine.loop, engine.executor_for(engine.policy))]
        del engine
        assert [part() for part in parts] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_peak_memory_is_the_weights_and_the_cache(tmp_path: Path, shards: int) -> None:
    CONFIG.save_pretrained(tmp_path)
    shapes = expected_parameters(ModelConfig.from_hf(CONFIG))
    tensors = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    if shards == 1:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        index = {}
        for shard in range(shards):
            file = f"model-{shard}.safetensors"
            part = dict(list(tensors.items())[shard::shards])
            save_file(part, tmp_path / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    peak, weights, cache = json.loads(run.stdout)
    assert weights > 250e6
    assert peak > weights, "the measurement misses the weights"
    print(f"peak {peak / 1e6:.0f} MB, {peak / (weights + cache):.3f} of weights and cache")
    assert peak <= 1.15 * (weights + cache), f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} + {cache / 1e6:.0f} MB"
