"""Where a checkpoint lies and what stands beside its weights: configuration, tokenizer, generation defaults."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from skipkernels.errors import ModelError
from skipkernels.model.gguf_config import hf_config
from skipkernels.model.gguf_file import GgufFile, gguf_of_folder
from skipkernels.model.gguf_tokenizer import load_gguf_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab*"]


_ADAPTER = "adapter_config.json"
_GENERATION_FILE = "generation_config.json"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def resolve_checkpoint(model: str | Path) -> Path:
    """Where a checkpoint lies: the folder of a Hugging Face checkpoint, the path itself or a snapshot of the hub id
    (downloaded where needed), or a GGUF file, given or the only one of its folder."""
    if not isinstance(model, str | Path):
        raise ModelError(
            f"a model is a folder, a hub id or a transformers module, got a {type(model).__name__}; "
            "merge adapters and unwrap compiled modules first"
        )
    path = Path(model)
    if path.is_dir():
        return _in_folder(_snapshot_of(path))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{model}: no such file")
        return path
    if path.exists():
        raise ModelError(f"{model}: is a file; give a .gguf file, or the folder of a Hugging Face checkpoint")
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise ModelError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(str(model), allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client raises many kinds, none of them ours
        raise ModelError(f"{model}: neither a folder nor loadable from the hub ({_first_line(error)})") from error
    return _in_folder(snapshot)


def _in_folder(path: Path) -> Path:
    """The folder of a Hugging Face checkpoint, or the GGUF file in it."""
    if not (path / "config.json").exists() and (gguf := gguf_of_folder(path)):
        return gguf
    _check_folder(path)
    return path


def _snapshot_of(path: Path) -> Path:
    """The folder itself; of a repository in the hub's cache, the snapshot of its main branch."""
    reference = path / "refs" / "main"
    if not (path / "snapshots").is_dir() or (path / "config.json").exists():
        return path
    snapshot = path / "snapshots" / (reference.read_text().strip() if reference.is_file() else "")
    if not (snapshot / "config.json").exists() and not any(snapshot.glob("*.gguf")):
        found = ", ".join(sorted(each.name for each in (path / "snapshots").iterdir())) or "none"
        raise ModelError(f"{path}: is a repository in the hub's cache; give one of its snapshots' folders: {found}")
    return snapshot


def _check_folder(path: Path) -> None:
    if not (path / "config.json").exists():
        what = "only an adapter; merge it into its base model" if (path / _ADAPTER).exists() else "no config.json"
        raise ModelError(f"{path}: holds {what}, so it is no Hugging Face checkpoint")
    if (path / _ADAPTER).exists():
        raise ModelError(f"{path}: holds {_ADAPTER}, and adapters are not read; merge it into the model or remove it")


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of what ``resolve_checkpoint`` found."""
    from transformers import GenerationConfig

    if folder.is_file():
        return hf_config(GgufFile(folder))
    try:
        config = _read_config(folder)
        GenerationConfig.from_model_config(config)  # as a module of it would be made
    except Exception as error:  # transformers' validation raises kinds of its own, with the reason on the second line
        own_code = "trust_remote_code" in str(error)
        reason = "the model is code of its own, which is never run" if own_code else _one_line(error)
        raise ModelError(f"{folder}: its config.json cannot be read ({reason})") from error
    return config


def _read_config(folder: Path) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    document, _ = PreTrainedConfig.get_config_dict(folder)
    scaling = document.get("rope_scaling")
    if isinstance(scaling, dict) and "su" in (scaling.get("type"), scaling.get("rope_type")):
        # longrope's first name, in Phi-3's first checkpoints: transformers 5 misses their original length
        document["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
        return CONFIG_MAPPING[document["model_type"]].from_dict(document)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # None would ask on stdin


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None, with a warning, where it has none."""
    from transformers import AutoTokenizer

    if folder.is_file():
        return load_gguf_tokenizer(GgufFile(folder))
    if not any((folder / name).exists() for name in (*_VOCABULARIES, "tokenizer_config.json")):
        logger.warning("%s holds no tokenizer; prompts must be token ids", folder)
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask on stdin
        own_tokens = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    except Exception as error:  # whatever a broken file makes of transformers' readers
        missing = "" if find_spec("sentencepiece") else "; a tokenizer.model needs `pip install sentencepiece`"
        own_code = "trust_remote_code" in str(error)
        reason = "it is code of its own, which is never run; pass tokenizer=" if own_code else _one_line(error)
        own = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
        raise ModelError(f"{folder}: its tokenizer cannot be read ({reason}){missing if own else ''}") from error
    if not own_tokens:  # transformers makes one out of tokenizer_config.json alone
        raise ModelError(f"{folder}: its tokenizer has no vocabulary; tokenizer.json or tokenizer.model is missing")
    return tokenizer


def load_generation_config(folder: Path) -> GenerationConfig:
    """What transformers' generation config would hold: generation_config.json, or what config.json says of it."""
    from transformers import GenerationConfig

    try:
        try:
            return GenerationConfig.from_pretrained(folder)
        except OSError as error:
            if (folder / _GENERATION_FILE).exists():
                logger.warning("%s: %s cannot be read; config.json counts (%s)", folder, _GENERATION_FILE, error)
            return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    except Exception as error:
        raise ModelError(f"{folder}: its generation config cannot be used ({_one_line(error)})") from error


def default_eos_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: GenerationConfig | None
) -> tuple[int, ...]:
    """The model's own end-of-sequence tokens: the generation config's, else those of a tokenizer that was given."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    listed = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    for token in listed:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ModelError(f"eos_token_id must be an integer or a list of them, got {eos!r}")
    return tuple(dict.fromkeys(token for token in listed if 0 <= token < 1 << 31))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
