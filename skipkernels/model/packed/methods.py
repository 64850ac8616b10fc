"""Methods: which layout a checkpoint's ``quantization_config`` names."""

from __future__ import annotations

from collections.abc import Callable

from skipkernels.errors import ModelError
from skipkernels.model.packed.awq import Awq
from skipkernels.model.packed.compressed_tensors import METHOD, CompressedTensors
from skipkernels.model.packed.fp8 import Fp8
from skipkernels.model.packed.gptq import Gptq
from skipkernels.model.packed.packed_matrix import PackedLayout
from skipkernels.model.packed.settings import Settings

_METHODS: dict[str, Callable[[Settings], PackedLayout]] = {
    "gptq": Gptq,
    "awq": Awq,
    METHOD: CompressedTensors,
    "fp8": Fp8,
}
_SUPPORTED = (
    "gptq (4 and 8 bits), awq (4 bits), compressed-tensors (int 4 and 8 bits, float 8 bits), fp8; and GGUF files"
)


def layout_of(settings: Settings) -> PackedLayout:
    """
    Raises:
        ModelError: a method or a variant that is not read; the message names it, and what is.
    """
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if method not in _METHODS:
        raise ModelError(
            f"quantised by {method or 'an unknown method'}, which is not read; supported: {_SUPPORTED}. A checkpoint "
            "in fp32, bf16 or fp16 can be quantised at load (--dtype q4_0, q8_0, ...)"
        )
    return _METHODS[method](settings)
