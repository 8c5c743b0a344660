"""ragged_transpose_quant: traced group sizes, one padded result."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_tsq._core import numerics, primitive, results, validate
from jax_tsq._core.groups import PaddedGroups, padded_length, place, source_rows
from jax_tsq._core.limits import MOST_TOKENS
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._core.primitive import Operation, Result


@results.register
class RaggedQuantized(NamedTuple):
    """Transposed FP8 operands of all groups, each group padded with zeros to a multiple of 128 tokens.

    `x ~= values * scales` with x in padded order, see `jax_tsq.pad_rows`.

    Attributes:
        values: float8_e4m3fn `[K, P]`, tokens contiguous; in the flat layout `[K * P]`, in which group i is the
            contiguous `[K, padded_sizes[i]]` block that starts at `K * (padded_sizes[0] + ... + padded_sizes[i - 1])`.
        scales: float32 `[P / 128, K]` dequantization scales; 1 in blocks of no group.
        padded_sizes: int32 `[E]`, tokens of each group **in `values`**, padding included: multiples of 128.
    """

    values: jax.Array
    scales: jax.Array
    padded_sizes: jax.Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """`[P, K]` in padded order, see `jax_tsq.dequantize`."""
        return results.dequantize_columns(self._packed_values(), self.scales, dtype)

    def _packed_values(self) -> jax.Array:
        """The values `[..., K, P]` of either layout."""
        values, (*_, blocks, features) = self.values, self.scales.shape
        if values.ndim == self.scales.ndim:
            return values
        if values.ndim != 1:
            raise ValueError(
                "quantized must have no batch dimensions in the flat layout; got values "
                f"{validate.describe(values)}. Use jax.vmap(jax_tsq.dequantize)."
            )
        sizes = self.padded_sizes
        groups = PaddedGroups(sizes, jnp.cumsum(sizes, dtype=jnp.int32) - sizes)
        lines = values.reshape(-1, BLOCK)
        packed_line = flat_lines(groups, features, blocks * BLOCK)
        return jnp.zeros_like(lines).at[packed_line].set(lines, mode="drop").reshape(features, -1)


def ragged_transpose_quant(
    x: jax.Array,
    group_sizes: jax.Array,
    *,
    input_scales: jax.Array | None = None,
    pow_2_scales: bool = False,
    aligned: bool = False,
    layout: Literal["packed", "flat"] = "packed",
) -> RaggedQuantized:
    """Quantizes tokens sorted by group to FP8 along tokens and transposes them; the group sizes may be traced.

    Every group starts on a multiple of 128 in the result and is padded with zeros to one, inside the one kernel that
    quantizes. Values and scales of a group are those of `jax_tsq.fused_transpose_split_quant`:

        amax   = max |v[t, k]| over a block of 128 tokens of a group, NaN left out
        q      = 448 / amax (1 if amax is 0), with pow_2_scales rounded down to a power of two
        value  = float8_e4m3fn(v * q), rounded to nearest even, saturating at +-448
        scale  = 1 / q

    Rows of x past the sum of the sizes are never read. Traced sizes stay on the device: a new routing costs neither a
    compilation nor a synchronisation. Since a compiled program cannot raise on data, traced sizes that break the rules
    are clipped: negative ones count as 0, no group reaches past row M, and with `aligned` each is rounded down to a
    multiple of 128. `jax_tsq.check_group_sizes` raises on them. Sizes that are not traced are checked in any case, on
    the host.

    Args:
        x: `[M, K]` tokens x features, sorted by group; bfloat16, or float8_e4m3fn together with `input_scales`.
        group_sizes: `[E]`, tokens of each group, traced or not; their sum is at most M. Any sizes, 0 included, of any
            integer dtype: what is not traced must fit into int32, traced values are clipped to it.
        input_scales: None for bfloat16 x. For float8_e4m3fn x its row-wise dequantization scales, float32
            `[M, ceil(K / 128)]`.
        pow_2_scales: whether scales are powers of two.
        aligned: promises that all sizes are multiples of 128, which makes P as small as it can be.
        layout: "packed" gives `values` as `[K, P]`, which can be sharded along K; "flat" gives `[K * P]` with every
            group contiguous, as k-grouped GEMMs of DeepGEMM's kind take it. A flat result can be split along K only
            inside `jax.shard_map`; elsewhere x is gathered.

    Returns:
        `RaggedQuantized(values, scales, padded_sizes)`: float8_e4m3fn `[K, P]` (or `[K * P]`), float32 `[P / 128, K]`
        and int32 `[E]`, the sizes with padding; P = `padded_tokens(M, E, aligned=aligned)`. Outside the groups values
        are 0 and scales 1.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: x is not two-dimensional, group_sizes not one-dimensional, input_scales are missing, not wanted or
            of a wrong shape, layout is unknown, P exceeds 2**31 - 128, or sizes that are not traced break the rules.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (384, 512), jnp.bfloat16)
        >>> quantized = jax.jit(jax_tsq.ragged_transpose_quant)(x, jnp.array([100, 0, 284], jnp.int32))
        >>> quantized.values.shape, quantized.scales.shape, quantized.padded_sizes.tolist()
        ((512, 640), (5, 512), [128, 0, 384])

    The scaling recipe is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3); the form of the arguments follows
    `jax.lax.ragged_dot`.
    """
    x = validate.check_tokens(x)
    aligned = validate.check_flag("aligned", aligned)
    group_sizes = validate.check_sizes(group_sizes, x.shape[0], aligned=aligned)
    input_scales = validate.check_input_scales(input_scales, x)
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    if layout not in ("packed", "flat"):
        raise ValueError(f'layout must be "packed" or "flat"; got {validate.describe(layout)}.')
    check_length(x, group_sizes, aligned)
    return RaggedQuantized(
        *primitive.bind(
            ragged_p,
            x,
            group_sizes,
            input_scales,
            pow_2_scales=pow_2_scales,
            aligned=aligned,
            flat=layout == "flat",
        )
    )


def check_length(x: jax.Array, group_sizes: jax.Array, aligned: bool, name: str = "x") -> None:
    """Raises if padded groups of x have too many tokens."""
    padded = padded_length(validate.check_count(f"{name}.shape[0]", x.shape[0]), group_sizes.shape[0], aligned)
    if padded > MOST_TOKENS:
        raise ValueError(
            f"{name} and group_sizes must need at most 2**31 - {BLOCK} padded tokens; got {x.shape[0]} tokens in "
            f"{group_sizes.shape[0]} groups, which need {padded}. Split the call by groups."
        )


def infer(x: tuple[int, ...], group_sizes: tuple[int, ...], *_, pow_2_scales, aligned, flat) -> list[Result]:
    """Types of values, scales and padded sizes, for shapes without batch dimensions."""
    (tokens, features), (groups,) = x, group_sizes
    padded = padded_length(tokens, groups, aligned)
    packed = Result(("features", "padded_tokens"), (features, padded), FP8)
    return [
        Result(("flat_values",), (features * padded,), FP8) if flat else packed,
        Result(("token_blocks", "features"), (padded // BLOCK, features), jnp.float32),
        Result(("groups",), (groups,), jnp.int32),
    ]


def reference(x, group_sizes, input_scales=None, *, pow_2_scales, aligned, flat) -> list[jax.Array]:
    """The operation in pure JAX, for operands with any batch dimensions in front."""

    def run(x, group_sizes, input_scales):
        tokens, features = x.shape
        padded = padded_length(tokens, group_sizes.shape[0], aligned)
        placement = place(group_sizes, tokens, aligned)
        index = source_rows(placement, tokens, padded)
        bits = jnp.take(numerics.bf16_bits(x, input_scales), index, axis=0, mode="fill", fill_value=0)
        values, scales = numerics.quantize_packed(bits, pow_2_scales)
        if flat:
            lines = values.reshape(-1, BLOCK)
            values = jnp.take(lines, flat_lines(placement.padded, features, padded), axis=0, mode="fill", fill_value=0)
            values = values.reshape(-1)
        return values, scales, placement.padded.sizes

    for _ in range(x.ndim - 2):
        run = jax.vmap(run)
    return list(run(x, group_sizes, input_scales))


def flat_lines(groups: PaddedGroups, features: int, padded: int) -> jax.Array:
    """For each line of 128 values of the flat layout its line in the packed one, out of range behind the last group."""
    blocks, first = groups.sizes // BLOCK, groups.starts // BLOCK
    line = jnp.arange(features * padded // BLOCK, dtype=jnp.int32)
    group = jnp.searchsorted((first + blocks) * features, line, side="right", method="sort")
    blocks, first = (jnp.take(a, group, mode="fill", fill_value=1) for a in (blocks, first))
    within = line - first * features
    packed = within // blocks * (padded // BLOCK) + first + within % blocks
    return jnp.where(group < groups.sizes.shape[0], packed, line.size)


ragged_p = primitive.define(
    Operation(
        name="ragged",
        function="ragged_transpose_quant",
        operands=(("tokens", "features"), ("groups",), ("tokens", "feature_blocks")),
        results=infer,
        reference=reference,
        parallel=lambda *_, flat, **__: () if flat else ("features",),
        attributes=("pow_2_scales", "aligned", "flat"),
        blocks={"feature_blocks": "features"},
    )
)
