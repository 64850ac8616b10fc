"""Every tolerance of the tests, with its reason. A difference passes when it is at most ``atol + rtol * |expected|``,
where ``atol`` is in units of the largest expected magnitude."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-5, "fp32 sums of some hundred terms in another order: 2^-24 each, with cancellation"),
    "bf16": Tolerance(2**-7, 1e-5, "the same fp32 value stored in bf16: a rounding that flips moves it by one ulp"),
    "fp16": Tolerance(2**-10, 1e-5, "the same fp32 value stored in fp16: a rounding that flips moves it by one ulp"),
    "bf16 activations": Tolerance(
        0,
        0.02,
        "activations rounded to bf16 (2^-9 each) before dot products of pairs, caches again behind them",
    ),
    "int8 activations": Tolerance(
        0, 0.01, "an activation that differs in its last fp32 bit may round to the next of 127 integers"
    ),
    "square root": Tolerance(4e-7, 0, "torch's square root is not correctly rounded: three ulp of a cosine"),
    "logits after layers, fp32": Tolerance(0, 1e-4, "the fp32 differences of each layer, amplified by the next ones"),
    "logits after layers, bf16": Tolerance(
        0, 0.05, "transformers rounds every activation to bf16 (2^-9 each, about ten a layer); ours stay fp32"
    ),
    "probability": Tolerance(0, 1e-6, "fp32 softmax over a vocabulary of some hundred tokens"),
    "similarity": Tolerance(0, 1e-5, "a cosine of fp32 sums; decisions closer to the threshold are not compared"),
}


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: str, what: str = "") -> None:
    """NaN and infinities in the same places, all else within the named tolerance."""
    limit = TOLERANCES[tolerance]
    assert actual.shape == expected.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite()), f"{what}: NaN or infinity in different places"
    special = torch.nan_to_num(actual[~finite], nan=0.0), torch.nan_to_num(expected[~finite], nan=0.0)
    assert torch.equal(*special), f"{what}: infinities or NaN in different places"
    if not finite.any():
        return
    actual, expected = actual[finite], expected[finite]
    allowed = limit.atol * expected.abs().max() + limit.rtol * expected.abs()
    excess = ((actual - expected).abs() - allowed).max()
    assert excess <= 0, (
        f"{what}: differs by {(actual - expected).abs().max():.3g} at magnitude {expected.abs().max():.3g}, "
        f"more than {tolerance} allows ({limit.reason})"
    )
