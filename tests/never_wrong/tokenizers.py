"""Tokenizers of the three kinds whose tokens are not characters: byte-fallback, byte-level, sentencepiece-like."""

import struct

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.models import byte_tokenizer

WORDS = ("▁", "▁a", "a", "é", "▁日", "。", ",", "▁the", "'s", "▁'", "\n")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: <unk> <s> </s>, then the 256 bytes, then words; a run of bytes is decoded as a whole."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """T5's and Gemma's kind: pieces with a mark for the space in front of them, which a first one loses."""
    names = ["<unk>", "<s>", "</s>", *WORDS]
    backend = Tokenizer(models.Unigram([(name, -float(index)) for index, name in enumerate(names)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS = {
    "byte fallback": byte_fallback_tokenizer,
    "byte level": byte_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
}


def byte_ids(text: str) -> list[int]:
    """Text in byte-fallback tokens only."""
    return [3 + byte for byte in text.encode()]


def sentencepiece_model(words: tuple[str, ...] = ("▁", "h", "i", "hi", "▁hi")) -> bytes:
    """A tokenizer.model of <unk>, <s>, </s> and words, in protobuf's encoding: a BPE without normalisation."""

    def field(number: int, content: bytes | str | int) -> bytes:
        if isinstance(content, int):
            return bytes([number << 3, content])
        data = content.encode() if isinstance(content, str) else content
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, field(1, text) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, kind))

    special = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3)
    ordinary = b"".join(piece(word, -float(index), 1) for index, word in enumerate(words))
    return special + ordinary + field(2, field(3, 2)) + field(3, field(1, "identity") + field(4, 0))
