"""sample: argmax of the logits, or Gumbel-max over the tokens that survive top-k, top-p and min-p.

One program has a row and walks over its vocabulary, BLOCK tokens at a time: once for an argmax and once more for a
draw. The edges of top-k and top-p are found without sorting, digit by digit of an integer that orders as the scores do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.order import NO_RANK, order_key, ranked, ranked_score, ranked_token
from skipkernels.kernels.triton.philox import SAMPLE_STREAM, philox_uniform
from skipkernels.program.state import ADJUSTS_BIAS as _ADJUSTS_BIAS
from skipkernels.program.state import ADJUSTS_COUNTS as _ADJUSTS_COUNTS
from skipkernels.program.state import ADJUSTS_MASK as _ADJUSTS_MASK
from skipkernels.program.table import Instruction

BLOCK = 1024
WARPS = 8
"""With 16, a thread has 128 registers at most, and an H100's compiler wants more."""
DIGIT_BITS = tl.constexpr(2)
NUM_DIGITS = tl.constexpr(16)  # of 32 bits
ADJUSTS_BIAS = tl.constexpr(_ADJUSTS_BIAS)
ADJUSTS_COUNTS = tl.constexpr(_ADJUSTS_COUNTS)
ADJUSTS_MASK = tl.constexpr(_ADJUSTS_MASK)


@triton.jit
def scores_of(tokens, row, vocab_size: tl.constexpr):
    """fp32 scores [BLOCK] after bias, penalties, mask and temperature, -inf beyond the vocabulary."""
    logits, seen, penalty, temperature, adjusts, logit_bias, frequency, presence, token_mask = row
    inside = tokens < vocab_size
    score = tl.load(logits + tokens, mask=inside, other=0.0)
    adjusts = adjusts + tl.zeros_like(tokens)
    biased = (adjusts & ADJUSTS_BIAS) != 0
    score = tl.where(biased, score + tl.load(logit_bias + tokens, mask=inside & biased, other=0.0), score)
    count = tl.load(seen + tokens, mask=inside, other=0).to(tl.int32)
    penalised = tl.where(score > 0, tl.div_rn(score, penalty), score * penalty)
    score = tl.where(count != 0, penalised, score)
    fewer = (score - (count >> 1).to(tl.float32) * frequency) - presence
    score = tl.where((count > 1) & ((adjusts & ADJUSTS_COUNTS) != 0), fewer, score)
    masked = (adjusts & ADJUSTS_MASK) != 0
    word = tl.load(token_mask + tokens // 32, mask=inside & masked, other=-1)
    allowed = inside & (((word >> (tokens % 32)) & 1) != 0)
    return tl.where(allowed, tl.div_rn(score, temperature), float("-inf"))


@triton.jit
def weight_of(score, top):
    return tl.exp(score.to(tl.float64) - top.to(tl.float64))


@triton.jit
def mass_from(keys, row, top, WEIGHTED: tl.constexpr, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """For each of the rising ``keys``, the tokens whose order keys reach it: their weights exp(score - top), or their
    number."""
    lowest = tl.min(keys, axis=0)
    mass = tl.zeros(keys.shape, tl.float64 if WEIGHTED else tl.int32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=4):
        score = scores_of(start + tl.arange(0, BLOCK), row, vocab_size)
        key = order_key(score)
        if tl.max(key, axis=0) >= lowest:
            weight = weight_of(score, top) if WEIGHTED else tl.full([BLOCK], 1, tl.int32)
            mass += tl.sum(tl.where(key[:, None] >= keys[None, :], weight[:, None], 0), axis=0)
    return mass


@triton.jit
def weight_from(key, row, top, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    return tl.sum(mass_from(key + tl.zeros([1], tl.int64), row, top, True, vocab_size, BLOCK), axis=0)


@triton.jit
def edge_of(target, floor, row, top, WEIGHTED: tl.constexpr, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """The largest order key from which on tokens have a mass of ``target``; only tokens from ``floor`` on count."""
    edge = tl.zeros([], tl.int64)
    for digit in range(NUM_DIGITS):
        shift = DIGIT_BITS * (NUM_DIGITS - 1 - digit)
        candidates = edge + (tl.arange(0, 2**DIGIT_BITS).to(tl.int64) << shift)
        mass = mass_from(tl.maximum(candidates, floor), row, top, WEIGHTED, vocab_size, BLOCK)
        edge += (tl.sum((mass >= target).to(tl.int64), axis=0) - 1) << shift  # mass falls: a first few reach it
    return edge


@triton.jit
def draw(row, best, top_k, top_p, min_p, seed, step, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """The token whose score plus Gumbel noise is largest, among those that survive; there is a finite ``best``."""
    top = ranked_score(best)
    edge = tl.zeros([], tl.int64)  # the least key that survives
    above = tl.zeros([], tl.float64)  # the weight above it,
    enough = tl.full([], float("inf"), tl.float64)  # and the weight behind which tokens of this key are dropped
    if (top_k > 0) & (top_k < vocab_size):
        edge = edge_of(top_k, edge, row, top, False, vocab_size, BLOCK)
    if top_p < 1.0:
        enough = top_p.to(tl.float64) * weight_from(edge, row, top, vocab_size, BLOCK)
        edge = edge_of(enough, edge, row, top, True, vocab_size, BLOCK)
        above = weight_from(edge + 1, row, top, vocab_size, BLOCK)
    least = float("-inf") + tl.zeros([], tl.float64)
    if min_p > 0:
        least = top.to(tl.float64) + tl.log(min_p.to(tl.float64))

    values = tl.full([BLOCK], float("-inf"), tl.float64)
    chosen = tl.full([BLOCK], 0, tl.int32) + ranked_token(best)
    num_edge = tl.zeros([], tl.int32)  # tokens of the edge's key so far
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        score = scores_of(tokens, row, vocab_size)
        key = order_key(score)
        if tl.max(key, axis=0) >= edge:
            at_edge = (key == edge).to(tl.int32)
            before = above + (num_edge + tl.cumsum(at_edge, axis=0) - at_edge) * weight_of(score, top)
            survives = (key > edge) | ((key == edge) & (before < enough))
            survives &= (score.to(tl.float64) >= least) & (tokens < vocab_size)
            num_edge += tl.sum(at_edge, axis=0)
            block = start // 4 + tl.arange(0, BLOCK // 4)
            uniform = tl.reshape(philox_uniform(seed, block, step + tl.zeros_like(block), SAMPLE_STREAM), [BLOCK])
            value = tl.where(survives, score.to(tl.float64) - tl.log(-tl.log(uniform)), float("-inf"))
            chosen = tl.where(value > values, tokens, chosen)
            values = tl.maximum(values, value)
    return tl.min(tl.where(values == tl.max(values, axis=0), chosen, vocab_size), axis=0)


@triton.jit
def likeliest_below(rank, logits, vocab_size: tl.constexpr, BLOCK: tl.constexpr):
    """The largest ``ranked`` of the logits below ``rank``."""
    ranks = tl.full([BLOCK], NO_RANK, tl.int64)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=4):
        tokens = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf"))
        own = tl.where(tokens < vocab_size, ranked(logit, tokens), NO_RANK)
        ranks = tl.maximum(ranks, tl.where(own < rank, own, NO_RANK))
    return tl.max(ranks, axis=0)


@triton.jit(do_not_specialize=["max_seq_len"])
def logprobs_kernel(
    logits,
    num_generated,
    num_logprobs,
    next_token,
    logprobs,
    top_tokens,
    row_mask,
    max_seq_len,
    vocab_size: tl.constexpr,
    num_logprobs_kept: tl.constexpr,
    num_top_kept: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log softmax of the model's own logits: of the token, then of the likeliest, each found by a pass of its own. A
    kernel of its own, because the two together need more registers than there are."""
    index = tl.program_id(0)
    if tl.load(row_mask + index) == 0:
        return
    count = tl.load(num_logprobs + index)
    if count == 0:
        return
    logits += index.to(tl.int64) * vocab_size
    step = index.to(tl.int64) * max_seq_len + tl.load(num_generated + index)
    logprobs += step * num_logprobs_kept
    top_tokens += step * num_top_kept
    token = tl.load(next_token + index)
    rank = likeliest_below(tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64), logits, vocab_size, BLOCK)
    top = ranked_score(rank)
    weights = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=4):
        tokens = start + tl.arange(0, BLOCK)
        weights += weight_of(tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")), top)
    log_total = top.to(tl.float64) + tl.log(tl.sum(weights, axis=0))
    tl.store(logprobs, (tl.load(logits + token).to(tl.float64) - log_total).to(tl.float32))
    for i in range(1, tl.minimum(count, vocab_size + 1)):
        tl.store(top_tokens + i - 1, ranked_token(rank))
        tl.store(logprobs + i, (ranked_score(rank).to(tl.float64) - log_total).to(tl.float32))
        rank = likeliest_below(rank, logits, vocab_size, BLOCK)


@triton.jit
def sample_kernel(
    logits,
    seen,
    num_generated,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    adjusts,
    logit_bias,
    frequency_penalty,
    presence_penalty,
    token_mask,
    seed,
    next_token,
    row_mask,
    vocab_size: tl.constexpr,
    mask_words: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    if tl.load(row_mask + index) == 0:
        return
    at = index.to(tl.int64) * vocab_size
    heat = tl.load(temperature + index)
    greedy = heat == 0
    row = (
        logits + at, seen + at, tl.load(repetition_penalty + index), tl.where(greedy, 1.0, heat),
        tl.load(adjusts + index), logit_bias + at, tl.load(frequency_penalty + index),
        tl.load(presence_penalty + index), token_mask + index.to(tl.int64) * mask_words,
    )  # fmt: skip
    ranks = tl.full([BLOCK], NO_RANK, tl.int64)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=4):
        tokens = start + tl.arange(0, BLOCK)
        ranks = tl.maximum(ranks, ranked(scores_of(tokens, row, vocab_size), tokens))
    best = tl.max(ranks, axis=0)
    token = ranked_token(best)
    if not greedy and tl.abs(ranked_score(best)) < float("inf"):  # else there is nothing to draw from
        token = draw(
            row, best, tl.load(top_k + index), tl.load(top_p + index), tl.load(min_p + index),
            tl.load(seed + index), tl.load(num_generated + index), vocab_size, BLOCK,
        )  # fmt: skip
    tl.store(next_token + index, token)


def sample(ins: Instruction) -> tuple[Launch, ...]:
    block = min(BLOCK, max(4, triton.next_power_of_2(ins.sizes["vocab_size"])))
    grid = (ins.sizes["num_sequences"],)
    return tuple(
        Launch.of(kernel, ins, grid, {"BLOCK": block}, num_warps=WARPS, fuse_multiply_add=False)
        for kernel in (sample_kernel, logprobs_kernel)
    )
