"""What a GGUF file says of a Hugging Face tokenizer: tokens and their kinds, merges, special tokens, chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
from gguf import TokenType

from skipkernels.errors import ModelError
from skipkernels.model.gguf_splits import split_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, ends: tuple[int, ...], source: str
) -> None:
    """Writes ``tokenizer`` for a model with ``size`` embeddings whose answers end at ``ends``.

    Raises:
        ModelError: it is no tokenizer that llama.cpp has: byte pairs over bytes, split in a known way, or
            sentencepiece's byte pairs.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{source}: its tokenizer ({type(tokenizer).__name__}) is no fast one and cannot be written")
    document = json.loads(backend.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{source}: a tokenizer of kind {model['type']} cannot be written; byte pairs (BPE) can")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, kinds = _tokens(document, size)
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(document))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(document.get("pre_tokenizer"), source))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special_tokens(writer, tokenizer, ends)


def _tokens(document: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token's text and kind; embeddings beyond the vocabulary are padding."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    for text, index in document["model"]["vocab"].items():
        if index < size:
            is_byte = document["model"]["byte_fallback"] and len(text) == 6 and text.startswith("<0x")
            tokens[index], kinds[index] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in document["added_tokens"]:
        if added["id"] < size:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    unknown = document["model"].get("unk_token")
    if unknown in document["model"]["vocab"]:
        kinds[document["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """sentencepiece merges the pair with the highest score first: the sooner a token is made, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def _adds_space(document: dict[str, Any]) -> bool:
    """Whether text begins with a space that was not there, as sentencepiece's models for Llama were trained."""
    parts = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    return '"type": "Prepend"' in parts or ('"type": "Metaspace"' in parts and '"prepend_scheme": "never"' not in parts)


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = eos if eos is not None and (eos in ends or not ends) else next(iter(ends), None)
    others = [token for token in ends if token != first]
    for index, add in (
        (bos, writer.add_bos_token_id),
        (first, writer.add_eos_token_id),
        (next(iter(others), None), writer.add_eot_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if index is not None:
            add(int(index))
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and encoded[0] == bos)
    writer.add_add_eos_token(eos is not None and encoded[-1] == eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
