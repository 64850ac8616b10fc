"""Products with matrices of blocks in planes (``model.planes``): words are read 32 bits at a time, and their codes
unpacked in registers. Weights are what the format says, exactly; products and sums are fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.model.matrix import Matrix
from skipkernels.model.planes import GROUP_COLUMNS, PLANE_FORMATS, PlaneSizes

GROUP = tl.constexpr(GROUP_COLUMNS)
STAGES = tl.constexpr(3)
"""Tiles of words on their way from memory while one is multiplied."""


Planes = tuple[int, int, int, str, int, int, int, int]
"""What kernels know of a matrix of blocks: codes of a word, upper bits of a code, offset, kind of scales; groups of a
row; where the planes of upper bits, scales and supers begin, in words of 32 bits."""


def plane_numbers(matrix: Matrix) -> Planes:
    kind, sizes = PLANE_FORMATS[matrix.format], PlaneSizes.of(matrix.format, *matrix.shape)
    starts = sizes.high // 4, sizes.scales // 4, sizes.supers // 4
    return kind.word_codes, kind.high_bits, kind.offset, kind.scales, sizes.groups, *starts


@triton.constexpr_function
def field_column(word_codes, field):
    """Where code ``field`` of a word lies behind the word's first column."""
    local = field % (word_codes // 2) * 2 + field // (word_codes // 2)
    return local % 4 + local // 4 * 16


@triton.jit
def half_of(word, which):
    """The fp16 number in the lower (``which`` 0) or upper (1) half of a word, as f32."""
    return ((word >> (which * 16)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3_of(codes, field: tl.constexpr):
    """Number ``field`` of the four in each word divided by 256, as f32: in fp16's places its bits have an exponent less
    15 and not less 7. The shift back repeats the sign, of which the mask leaves one."""
    return half_of(codes << (24 - 8 * field) >> 17 & 0xBF80, 0)


@triton.jit
def load_group_scales(weight, groups, mask, planes: tl.constexpr):
    """What numbers of ``e4m3_of`` are multiplied with, f32; ``groups`` are those of all rows."""
    return load_word(weight + planes[6], groups, mask).to(tl.float32, bitcast=True) * 256.0


@triton.jit
def first_columns(words, WORD_CODES: tl.constexpr):
    """The column of the first code of each word of a row."""
    GROUP_WORDS: tl.constexpr = GROUP // WORD_CODES
    within = words % GROUP_WORDS  # [half,] lane, block
    return words // GROUP_WORDS * GROUP + within // 16 * 16 + within % 16 // 4 * 4 + within % 4 * 32


@triton.jit
def load_word(weight, at, mask):
    return tl.load(weight + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def load_scales(weight, features, words, mask, planes: tl.constexpr):
    """What the codes of each word are multiplied with and what is added, f32: d, d of the block's other half, m."""
    SCALES: tl.constexpr = planes[3]
    block = words // (GROUP // planes[0]) * 4 + words % 4
    BLOCKS: tl.constexpr = planes[4] * 4
    at = features * BLOCKS + block
    if SCALES == "group":
        d = load_group_scales(weight, at // 4, mask, planes)
        other = d
        m = tl.zeros_like(d)
    elif SCALES == "half_and_min":
        pair = load_word(weight + planes[6], at, mask)
        d, m = half_of(pair, 0), half_of(pair, 1)
        other = d
    elif SCALES == "half":
        d = half_of(load_word(weight + planes[6], at // 2, mask), block % 2)
        m = tl.zeros_like(d)
        other = d
    else:
        pair = load_word(weight + planes[6], at // 2, mask) >> (block % 2 * 16)
        shared = features * (planes[4] // 2) + block // 8
        if SCALES == "k":
            numbers = load_word(weight + planes[7], shared, mask)
            d = half_of(numbers, 0) * (pair & 255).to(tl.float32)
            m = -(half_of(numbers, 1) * (pair >> 8 & 255).to(tl.float32))
            other = d
        else:
            number = half_of(load_word(weight + planes[7], shared // 2, mask), shared % 2)
            d = number * (pair << 24 >> 24).to(tl.float32)
            other = number * (pair << 16 >> 24).to(tl.float32)
            m = tl.zeros_like(d)
    return d, other, m


@triton.jit
def load_words(
    weight,  # i32: all planes
    features,  # [BLOCK_OUT]
    features_inside,
    words,  # of a row [BLOCK_WORDS]
    words_inside,
    planes: tl.constexpr,
):
    """Codes of words, upper bits, and scales as of ``load_scales``, each [BLOCK_OUT, BLOCK_WORDS]."""
    mask = features_inside[:, None] & words_inside[None, :]
    rows = features.to(tl.int64)[:, None]
    ROW_WORDS: tl.constexpr = planes[4] * (GROUP // planes[0])
    at = rows * ROW_WORDS + words[None, :]
    codes = load_word(weight, at, mask)
    high = codes
    if planes[1] == 1:
        high = load_word(weight + planes[5], at // 4, mask) >> (at % 4 * 8).to(tl.int32)
    elif planes[1] == 2:
        high = load_word(weight + planes[5], at // 2, mask) >> (at % 2 * 16).to(tl.int32)
    d, other, m = load_scales(weight, rows, words[None, :], mask, planes)
    return codes, high, d, other, m


@triton.jit
def field_weights(codes, high, d, other, m, field: tl.constexpr, planes: tl.constexpr):
    """The weights of code ``field`` of each word, f32."""
    if planes[3] == "group":
        return e4m3_of(codes, field) * d
    if planes[0] == 4:
        level = codes << (24 - 8 * field) >> 24
    else:
        level = codes >> (4 * field) & 15
        if planes[1] == 1:
            level |= (high >> field & 1) << 4
        elif planes[1] == 2:
            level |= (high >> (2 * field) & 3) << 4
    scale = other if field_column(planes[0], field) >= 16 else d
    weights = (level - planes[2]).to(tl.float32) * scale
    return weights + m if planes[3] == "half_and_min" or planes[3] == "k" else weights


@triton.jit
def block_products(
    x,  # f32 [num_rows, in_features]
    norm,  # f32 [in_features], or None
    weight,  # i32: the planes of [out_features, in_features]
    features,
    features_inside,
    rows,
    wanted,
    in_features: tl.constexpr,
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """(x * norm) @ weight[features].T, f32 [BLOCK_ROWS, BLOCK_OUT], and the squares of x, whose sum over the first axis
    is that of the row."""
    WORD_CODES: tl.constexpr = planes[0]
    ROW_WORDS: tl.constexpr = planes[4] * (GROUP // WORD_CODES)
    BLOCK_WORDS: tl.constexpr = BLOCK_IN // WORD_CODES
    # where tiles are filled, the compiler is to know that no mask is needed
    WORDS_DIVIDE: tl.constexpr = ROW_WORDS % BLOCK_WORDS == 0
    COLUMNS_DIVIDE: tl.constexpr = in_features % BLOCK_IN == 0
    # where a tile is a group, its sums are multiplied with the scale: weights that are would spill registers
    SCALES_SUMS: tl.constexpr = planes[3] == "group" and BLOCK_ROWS > 1 and BLOCK_IN == GROUP
    if BLOCK_ROWS == 1:
        squares = tl.zeros([BLOCK_WORDS], tl.float32)
        sums = tl.zeros([BLOCK_OUT, BLOCK_WORDS], tl.float32)
    else:
        squares = tl.zeros([BLOCK_WORDS, BLOCK_ROWS], tl.float32)
        sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, ROW_WORDS, BLOCK_WORDS, num_stages=STAGES):
        words = start + tl.arange(0, BLOCK_WORDS)
        words_inside = (words < ROW_WORDS) | WORDS_DIVIDE
        codes, high, d, other, m = load_words(weight, features, features_inside, words, words_inside, planes)
        first = first_columns(words, WORD_CODES)
        if SCALES_SUMS:
            of_group = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
            groups = features * planes[4] + start // BLOCK_WORDS
            scales = load_group_scales(weight, groups, features_inside, planes)
        for field in tl.static_range(WORD_CODES):
            weights = e4m3_of(codes, field) if SCALES_SUMS else field_weights(codes, high, d, other, m, field, planes)
            columns = first + field_column(WORD_CODES, field)
            inside = (columns < in_features) | COLUMNS_DIVIDE
            if BLOCK_ROWS == 1:
                values = tl.load(x + columns, mask=inside, other=0.0)
                if norm is not None:
                    squares += values * values
                    values *= tl.load(norm + columns, mask=inside, other=0.0)
                sums += weights * values[None, :]
            else:
                at = x + rows[None, :] * in_features + columns[:, None]
                values = tl.load(at, mask=wanted[None, :] & inside[:, None], other=0.0)
                if norm is not None:
                    squares += values * values
                    values *= tl.load(norm + columns, mask=inside, other=0.0)[:, None]
                if SCALES_SUMS:
                    of_group = tl.dot(weights, values, of_group, input_precision="tf32x3")
                else:
                    sums = tl.dot(weights, values, sums, input_precision="tf32x3")
        if SCALES_SUMS:
            sums += of_group * scales[:, None]
    out = tl.sum(sums, axis=1)[None, :] if BLOCK_ROWS == 1 else tl.trans(sums)
    return out, squares


@triton.jit
def store_row_of_blocks(
    to,  # f32 [in_features]
    weight,
    row,
    first,  # column, a multiple of BLOCK
    scale,
    in_features: tl.constexpr,
    planes: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``scale`` times BLOCK weights of a row, as far as there are."""
    WORD_CODES: tl.constexpr = planes[0]
    ROW_WORDS: tl.constexpr = planes[4] * (GROUP // WORD_CODES)
    words = first // WORD_CODES + tl.arange(0, BLOCK // WORD_CODES)
    features = row + tl.zeros([1], tl.int32)
    codes, high, d, other, m = load_words(weight, features, features >= 0, words, words < ROW_WORDS, planes)
    for field in tl.static_range(WORD_CODES):
        columns = (first_columns(words, WORD_CODES) + field_column(WORD_CODES, field))[None, :]
        weights = field_weights(codes, high, d, other, m, field, planes)
        tl.store(to + columns, weights * scale, mask=columns < in_features)
