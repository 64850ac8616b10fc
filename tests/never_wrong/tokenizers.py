"""Tokenizers of the three kinds whose tokens are not characters: byte-fallback, byte-level, sentencepiece-like."""

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
