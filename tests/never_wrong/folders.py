"""Checkpoint folders to spoil, and what transformers makes of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from skipkernels.engine import Engine
from tests.models import byte_tokenizer, random_prompt, tiny_module

WEIGHTS = "model.safetensors"
PROMPT = random_prompt(9)


def save(folder: Path, family: str = "llama", *, tokenizer: bool = False, **overrides: Any) -> Path:
    tiny_module(family, **overrides).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def edit_json(folder: Path, name: str = "config.json", drop: Sequence[str] = (), **changes: Any) -> None:
    document = json.loads((folder / name).read_text())
    for key in drop:
        document.pop(key, None)
    (folder / name).write_text(json.dumps(document | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def loaded(folder: Path) -> PreTrainedModel:
    """By transformers, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def expected_tokens(module: PreTrainedModel, prompt: Sequence[int] = PROMPT, count: int = 16) -> list[int]:
    """What the module's own forward chooses greedily, until its generation config's end of sequence.

    Without a cache: transformers cuts caches by configuration entries that the family's attention does not read.
    """
    eos = module.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def engine_of(folder: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(folder, **{"dtype": "fp32", "max_seq_len": 96, "num_threads": 1, **options})


def engine_tokens(folder: Path, count: int = 16, **options: Any) -> list[int]:
    return engine_of(folder, **options).generate(PROMPT, max_new_tokens=count)[0].token_ids
