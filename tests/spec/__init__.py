"""The operations in numpy, as their specification words them. Nothing here comes from the package under test.

Values are returned as float8_e4m3fn, scales as float32 dequantization scales. Matrices have no batch dimensions.
"""

from tests.spec.products import matmul, wgrad
from tests.spec.quantizers import (
    BLOCK,
    LARGEST_BF16,
    bfloat16,
    blocks,
    dual,
    float8_e4m3fn,
    load,
    padded_rows,
    padded_tokens,
    quant_scale,
    quantize,
    ragged,
    rows,
    split,
    taken_rows,
)
from tests.spec.swiglu import swiglu_backward_quantize, swiglu_quantize

__all__ = [
    "BLOCK",
    "LARGEST_BF16",
    "bfloat16",
    "blocks",
    "dual",
    "float8_e4m3fn",
    "load",
    "matmul",
    "padded_rows",
    "padded_tokens",
    "quant_scale",
    "quantize",
    "ragged",
    "rows",
    "split",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "taken_rows",
    "wgrad",
]
