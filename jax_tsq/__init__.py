"""Block-scaled FP8 operands for Mixture-of-Experts training in JAX."""

from importlib.metadata import version as _version

from jax_tsq._blocks import BlockQuantized, quantize_blocks
from jax_tsq._core.kernels import kernels_used
from jax_tsq._dequantize import dequantize
from jax_tsq._dual import ragged_quantize
from jax_tsq._linear import grouped_linear
from jax_tsq._matmul import ragged_matmul
from jax_tsq._mlp import moe_mlp
from jax_tsq._padding import (
    PaddedGroups,
    check_group_sizes,
    pad_group_sizes,
    pad_rows,
    padded_tokens,
    unpad_rows,
)
from jax_tsq._ragged import RaggedQuantized, ragged_transpose_quant
from jax_tsq._ragged_dot import ragged_dot
from jax_tsq._rows import RowQuantized, quantize_rows
from jax_tsq._split import SplitQuantized, fused_transpose_split_quant
from jax_tsq._swiglu import swiglu_backward_quantize, swiglu_quantize
from jax_tsq._wgrad import ragged_weight_gradient

__version__: str = _version("jax-tsq")
"""The version of the installed package."""

__all__ = [
    "BlockQuantized",
    "PaddedGroups",
    "RaggedQuantized",
    "RowQuantized",
    "SplitQuantized",
    "check_group_sizes",
    "dequantize",
    "fused_transpose_split_quant",
    "grouped_linear",
    "kernels_used",
    "moe_mlp",
    "pad_group_sizes",
    "pad_rows",
    "padded_tokens",
    "quantize_blocks",
    "quantize_rows",
    "ragged_dot",
    "ragged_matmul",
    "ragged_quantize",
    "ragged_transpose_quant",
    "ragged_weight_gradient",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "unpad_rows",
]
