"""The operations, one row each: how to call one, what it must give, and what a mesh may split.

What holds for every operation is tested over this table; a new operation is a row of it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_tsq
from jax_tsq import BlockQuantized, RaggedQuantized, RowQuantized, SplitQuantized
from tests import draws, spec
from tests.cases import assert_same_bytes, float8_e4m3fn


class Shape(NamedTuple):
    """The sizes of an example.

    Attributes:
        counts: tokens of each expert; their sum is the number of tokens.
        sizes: group sizes of one element of a batch after the other, and then from the first on again.
        features: products take an eighth or all of them, in multiples that their kernels take.
        kinds: the kinds of blocks in data that is to be quantized, None for all.
    """

    counts: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    features: int
    kinds: tuple[str, ...] | None = ("normal",)

    @property
    def tokens(self):
        return sum(self.counts)

    def group_sizes(self, seed):
        return np.int32(self.sizes[seed % len(self.sizes)])


@dataclasses.dataclass(frozen=True)
class Operation:
    """A row. Dimensions are words in a string; "feature_blocks" are split as "features" are.

    Attributes:
        function: the public function. Everything is passed by keyword.
        specification: the same in numpy, without batch dimensions.
        result: makes the public result of a list of its leaves.
        operands: a tree of dimensions for each operand, optional ones included.
        results: the dimensions of the results, a tree or the front of one.
        draw: makes the operands of a shape from a seed, numpy arrays or None.
        options: the static options for a shape.
        parallel: dimensions that a mesh may split without communication, and over how many devices in `mesh.SHAPE`.
        gathered: dimensions of the first operand that cost one gather of it where a mesh splits them.
        native: the platforms with native code, and the compute capability that this is for, if for only one.
        exact: whether every byte is specified. What is not is specified but for rounding.
    """

    function: Callable
    specification: Callable
    result: Callable[[list], Any]
    operands: Mapping[str, Any]
    results: Any
    draw: Callable[[Shape, int], tuple]
    options: Callable[[Shape], Mapping[str, Any]] = lambda shape: {}
    parallel: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"features": 8})
    gathered: tuple[str, ...] = ("tokens",)
    native: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: {"cpu": None, "cuda": None})
    exact: bool = True

    def call(self, **arguments):
        """The public function's result; operands that are not given are None."""
        return self.function(**dict.fromkeys(self.operands) | arguments)

    def expect(self, **arguments):
        """The specification's result, as the public function returns it."""
        return self.result(jax.tree.leaves(self.specification(**dict.fromkeys(self.operands) | arguments)))

    def assert_same(self, actual, expected):
        """Equal structure and bytes; of what is not specified to the byte, equal but for rounding."""
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            (assert_same_bytes if self.exact else assert_close)(a, e)

    def is_native(self, device):
        """Whether a device runs native code."""
        platform = "cuda" if device.platform == "gpu" else device.platform
        capability = self.native.get(platform)
        return platform in self.native and capability in (None, getattr(device, "compute_capability", None))


def assert_close(actual, expected, tolerance=5e-3):
    """Equal dtypes and shapes, and values but for rounding: of sums on tensor cores, of operands on other GPUs."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def _do1_and_h(leaves):
    """The public result of `swiglu_backward_quantize`."""
    *do1, h_values, h_scales, padded_sizes = leaves[:7]
    columns = RaggedQuantized(*do1[2:], padded_sizes), RaggedQuantized(h_values, h_scales, padded_sizes)
    return RowQuantized(*do1[:2]), *columns, leaves[7] if len(leaves) > 7 else None


COLUMNS = RaggedQuantized("features padded_tokens", "token_blocks features", "padded_sizes")

SPLIT = Operation(
    function=jax_tsq.fused_transpose_split_quant,
    specification=spec.split,
    result=lambda leaves: SplitQuantized(tuple(leaves[: len(leaves) // 2]), tuple(leaves[len(leaves) // 2 :])),
    operands={"x": "tokens features", "input_scales": "tokens feature_blocks"},
    results=SplitQuantized("features tokens", "token_blocks features"),
    draw=draws.tokens,
    options=lambda shape: {"tokens_per_expert": shape.counts},
)
RAGGED = Operation(
    function=jax_tsq.ragged_transpose_quant,
    specification=spec.ragged,
    result=lambda leaves: RaggedQuantized(*leaves),
    operands={"x": "tokens features", "group_sizes": "groups", "input_scales": "tokens feature_blocks"},
    results=COLUMNS,
    draw=draws.grouped_tokens,
)
ROWS = Operation(
    function=jax_tsq.quantize_rows,
    specification=spec.rows,
    result=lambda leaves: RowQuantized(*leaves),
    operands={"x": "tokens features", "group_sizes": "groups"},
    results=RowQuantized("tokens features", "tokens feature_blocks"),
    draw=lambda shape, seed: draws.tokens(shape, seed)[:1],
    parallel={"features": 8, "tokens": 8},
    gathered=(),
)
DUAL = Operation(
    function=jax_tsq.ragged_quantize,
    specification=spec.dual,
    result=lambda leaves: (RowQuantized(*leaves[:2]), RaggedQuantized(*leaves[2:])),
    operands={"x": "tokens features", "group_sizes": "groups"},
    results=(ROWS.results, COLUMNS),
    draw=lambda shape, seed: draws.grouped_tokens(shape, seed)[:2],
)
BLOCKS = Operation(
    function=jax_tsq.quantize_blocks,
    specification=spec.blocks,
    result=lambda leaves: BlockQuantized(*leaves),
    operands={"w": "groups features outputs"},
    results=BlockQuantized("groups features outputs", "groups outputs features", "groups feature_blocks output_blocks"),
    draw=draws.weights,
    parallel={"features": 4, "outputs": 4, "groups": 4},
    gathered=(),
)
WGRAD = Operation(
    function=jax_tsq.ragged_weight_gradient,
    specification=spec.wgrad,
    result=lambda leaves: leaves[0],
    operands={
        "x": COLUMNS,
        "dy": RaggedQuantized("outputs padded_tokens", "token_blocks outputs", "padded_sizes"),
        "accumulate": "groups features outputs",
    },
    results="groups features outputs",
    draw=draws.quantized_pair,
    parallel={"features": 8, "outputs": 8},
    gathered=("padded_tokens",),
    native={"cuda": "9.0"},
    exact=False,
)
MATMUL = Operation(
    function=jax_tsq.ragged_matmul,
    specification=spec.matmul,
    result=lambda leaves: leaves[0],
    operands={"x": ROWS.results, "w": BLOCKS.results, "group_sizes": "groups"},
    results="tokens outputs",
    draw=draws.rows_and_weights,
    parallel={"outputs": 4},
    gathered=("tokens",),
    native={"cuda": "9.0"},
    exact=False,
)
SWIGLU = Operation(
    function=jax_tsq.swiglu_quantize,
    specification=spec.swiglu_quantize,
    result=lambda leaves: RowQuantized(*leaves),
    operands={"gate_up": "tokens gates_and_ups", "group_sizes": "groups", "weights": "tokens"},
    results=RowQuantized("tokens h_features", "tokens h_blocks"),
    draw=draws.gates_and_ups,
    parallel={},
    gathered=("tokens", "gates_and_ups"),
)
DSWIGLU = Operation(
    function=jax_tsq.swiglu_backward_quantize,
    specification=spec.swiglu_backward_quantize,
    result=_do1_and_h,
    operands={
        "gate_up": "tokens gates_and_ups",
        "dh": "tokens h_features",
        "group_sizes": "groups",
        "weights": "tokens",
    },
    results=(
        RowQuantized("tokens gates_and_ups", "tokens gate_and_up_blocks"),
        RaggedQuantized("gates_and_ups padded_tokens", "token_blocks gates_and_ups", "padded_sizes"),
        RaggedQuantized("h_features padded_tokens", "token_blocks h_features", "padded_sizes"),
        "tokens",
    ),
    draw=draws.gates_ups_and_gradients,
    parallel={},
    gathered=("tokens", "gates_and_ups"),
)
OPERATIONS = {
    "split": SPLIT,
    "ragged": RAGGED,
    "rows": ROWS,
    "dual": DUAL,
    "blocks": BLOCKS,
    "wgrad": WGRAD,
    "matmul": MATMUL,
    "swiglu": SWIGLU,
    "dswiglu": DSWIGLU,
}

# Other operands and options of the same operations; a name begins with that of the operation.
ALL_EXAMPLES = OPERATIONS | {
    "split_fp8": dataclasses.replace(SPLIT, draw=functools.partial(draws.tokens, dtype=float8_e4m3fn)),
    "ragged_fp8": dataclasses.replace(RAGGED, draw=functools.partial(draws.grouped_tokens, dtype=float8_e4m3fn)),
    "ragged_flat_fp8": dataclasses.replace(
        RAGGED,
        results=COLUMNS._replace(values="values"),
        draw=functools.partial(draws.grouped_tokens, dtype=float8_e4m3fn),
        options=lambda shape: {"layout": "flat"},
        parallel={},
        gathered=("tokens", "features"),
    ),
    "rows_sized": dataclasses.replace(
        ROWS,
        draw=lambda shape, seed: draws.grouped_tokens(shape, seed)[:2],
        parallel={"features": 8},
        gathered=("tokens",),
    ),
    "wgrad_accumulate": dataclasses.replace(WGRAD, draw=draws.quantized_pair_and_sum),
    "matmul_transposed": dataclasses.replace(
        MATMUL,
        draw=functools.partial(draws.rows_and_weights, transpose_w=True),
        options=lambda shape: {"transpose_w": True},
        operands=MATMUL.operands
        | {
            "w": BlockQuantized(
                "groups outputs features", "groups features outputs", "groups output_blocks feature_blocks"
            )
        },
    ),
    "swiglu_unweighted": dataclasses.replace(
        SWIGLU, draw=lambda shape, seed: draws.gates_and_ups(shape, seed)[:2], options=lambda shape: {"limit": 0.75}
    ),
    "dswiglu_unweighted": dataclasses.replace(
        DSWIGLU,
        draw=lambda shape, seed: draws.gates_ups_and_gradients(shape, seed)[:3],
        options=lambda shape: {"limit": 0.75, "pow_2_scales": True},
    ),
    "blocks_joined": dataclasses.replace(BLOCKS, draw=draws.joined_weights, parallel={"features": 4, "groups": 4}),
}
# Those that stand for all where what is tried does not depend on the operation. Each has operands of another kind: one
# array; sizes and scales beside it; weights, of which two dimensions may be split; two operands and what is added.
OF_EACH_KIND = ("split", "ragged_fp8", "blocks", "wgrad_accumulate")
EXAMPLES = ALL_EXAMPLES  # that tests are parametrized with
FEW = bool(os.environ.get("JAX_TSQ_FEW_EXAMPLES"))  # with a JAX after another one that has tried all of them
if FEW:
    EXAMPLES = {name: ALL_EXAMPLES[name] for name in (*OF_EACH_KIND, "split_fp8", "ragged", "rows", "dual")}
QUANTIZERS = tuple(name for name, row in EXAMPLES.items() if row.exact)


class Call:
    """A call of an example with data, under vmap for each batch dimension.

    Attributes:
        function: takes the arrays.
        operands: those that there are: name -> numpy array, or a tree of them.
        arrays: the same in order.
        expected: the right result.
    """

    def __init__(self, name: str, shape: Shape, batch: tuple[int, ...] = (), seed: int = 0):
        self.key = (name, shape, batch, seed)
        self.row = ALL_EXAMPLES[name]
        self.options, self.operands = self.row.options(shape), _operands(*self.key)
        self.arrays = list(self.operands.values())
        self.function = self.one
        for _ in batch:
            self.function = jax.vmap(self.function)

    def one(self, *arrays, **options):
        """The public function of operands without batch dimensions; options take the place of the example's."""
        return self.row.call(**self._keywords(arrays), **self.options | options)

    def expect(self, *arrays, **options):
        """What the specification says of the same."""
        return self.row.expect(**self._keywords(arrays), **self.options | options)

    def _keywords(self, arrays):
        return dict(zip(self.operands, arrays, strict=True))

    @property
    def expected(self):
        return _expected(*self.key)

    def assert_right(self, result):
        self.row.assert_same(result, self.expected)

    def native_calls(self, device=None):
        """How many native calls there are in a program for this device, by default the first one."""
        return int(self.row.is_native(device or jax.devices()[0]))

    def operand_specs(self, batch=(), only=None, **axes):
        """PartitionSpecs of the operands: the mesh axes of batch dimensions, and of dimensions by name.

        Dimensions are split in all operands, or in one only.
        """
        return [
            jax.tree.broadcast(_specs(self.row.operands[name], batch, axes if only in (None, name) else {}), operand)
            for name, operand in self.operands.items()
        ]

    def specs(self, batch=(), **axes):
        """PartitionSpecs of the results, likewise."""
        return jax.tree.broadcast(_specs(self.row.results, batch, axes), self.expected)


def _specs(dims, batch, axes):
    def spec_of(words):
        return P(*batch, *(axes.get(word.replace("_blocks", "s")) for word in words.split()))

    return jax.tree.map(spec_of, dims)


@functools.cache
def _operands(name, shape, batch, seed):
    row = ALL_EXAMPLES[name]
    drawn = [row.draw(shape, seed + i) for i in range(math.prod(batch))]
    stacked = jax.tree.map(lambda *parts: np.stack(parts).reshape(*batch, *parts[0].shape), *drawn)
    return {operand: value for operand, value in zip(row.operands, stacked, strict=False) if value is not None}


@functools.cache
def _expected(name, shape, batch, seed):
    call = Call(name, shape, batch, seed)
    parts = [call.expect(*(jax.tree.map(lambda a, i=i: a[i], call.arrays))) for i in np.ndindex(batch)]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*batch, *leaves[0].shape), *parts)
