"""Where a checkpoint lies and what stands beside its weights: configuration, tokenizer, generation defaults."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from skipkernels.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab*"]


def resolve_checkpoint(model: str | Path) -> Path:
    """The local folder of a checkpoint: the path itself, or a snapshot of the hub id (downloaded where needed)."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path}: holds no config.json, so it is no Hugging Face checkpoint")
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise ModelError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client raises many kinds, none of them ours
        raise ModelError(f"{model}: neither a folder nor loadable from the hub ({_first_line(error)})") from error


def load_config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' validation raises kinds of its own, with the reason on the second line
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder}: its config.json cannot be read ({reason})") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None, with a warning, where it has none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        logger.warning("%s holds no tokenizer; prompts must be token ids", folder)
        return None
    return AutoTokenizer.from_pretrained(folder)


def load_generation_config(folder: Path) -> GenerationConfig | None:
    from transformers import GenerationConfig

    has_config = (folder / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(folder) if has_config else None


def default_eos_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: GenerationConfig | None
) -> tuple[int, ...]:
    """The model's own end-of-sequence tokens: the generation config's, else the tokenizer's."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
