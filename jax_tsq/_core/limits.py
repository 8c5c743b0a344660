"""The largest sizes that operations take."""

from jax_tsq._core.numerics import BLOCK

MOST_TOKENS = 2**31 - BLOCK
"""Tokens of a padded array: whole blocks that 32 bits count."""

MOST_PRODUCT_FEATURES = 2**31 - 256
"""Features of a product on the tensor cores, whose last tile may stick out."""

MOST_PRODUCT_GROUPS = 1024
"""Groups of a product on the tensor cores."""

MOST_PARTS = 16
"""Arrays that are quantized as one."""
