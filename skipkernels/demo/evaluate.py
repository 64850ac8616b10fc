"""What the demo model knows: facts answered word for word, and how well it predicts unseen text."""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipkernels.demo.batches import fact_tokens, text_stream
from skipkernels.demo.facts import Fact

BATCH = 64
WINDOW = 512


@torch.inference_mode()
def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> float:
    """Share of the facts whose whole completion, its end included, greedy decoding gives.

    Greedy decoding gives a completion if and only if every token of it is the most likely one after those before it, so
    one forward pass over question and answer decides, and nothing has to be generated.
    """
    hits = 0
    for start in range(0, len(facts), BATCH):
        pairs = [fact_tokens(tokenizer, fact) for fact in facts[start : start + BATCH]]
        tokens = pad_sequence([torch.tensor(prompt + completion) for prompt, completion in pairs], batch_first=True)
        best = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
        for row, (prompt, completion) in zip(best.tolist(), pairs, strict=True):
            end = len(prompt) + len(completion) - 1
            hits += row[len(prompt) - 1 : end] == completion
    return hits / len(facts)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> float:
    """Mean cost of the documents, read in windows of ``WINDOW`` tokens, in bits per byte of their UTF-8 text."""
    stream = text_stream(tokenizer, documents)
    nats = 0.0
    for start in range(0, len(stream) - 1, WINDOW):
        window = stream[start : start + WINDOW + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        nats += cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in documents)
