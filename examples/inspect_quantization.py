"""What FP8 does to a model, layer by layer: block maxima, subnormal values, errors of operands and of gradients.

    python -m examples.inspect_quantization                      a small character model after 20 steps
    python -m examples.inspect_quantization --output mine.png

For a model of your own, let a recorder compute its linear layers of experts in a step, which then leave their operands:

    recorder = Recorder()
    y = recorder.linear("layer 3, down")(x, w, group_sizes)      # where it calls jax_tsq.grouped_linear
    ...                                                          # one step with gradients, jitted or not
    reports = inspect(recorder.layers())
    print(table(reports))
    draw(reports, "mine.png")

On a mesh the records are of one device, and of its part of the operands.
"""

import argparse
import functools
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jax_tsq

SCALES = {"any": False, "powers of two": True}
COLUMNS = ("x subnormal", "dy subnormal", "dy lost", "x", "dy", "y", "dx", "dW")  # of the table


class Operands(NamedTuple):
    """Of one linear layer: x `[M, K]`, w `[E, K, N]`, group sizes `[E]` and dy `[M, N]`."""

    x: jax.Array
    w: jax.Array
    group_sizes: jax.Array
    dy: jax.Array


class Recorder:
    """Keeps the operands of the last call of every layer."""

    def __init__(self):
        self._arrays: dict[str, dict[str, np.ndarray]] = {}

    def linear(self, name: str) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        """`jax_tsq.grouped_linear`, which leaves its operands under a name."""
        self._arrays.setdefault(name, {})

        @jax.custom_vjp
        def run(x, w, group_sizes):
            return jax_tsq.grouped_linear(x, w, group_sizes)

        def forward(x, w, group_sizes):
            jax.debug.callback(functools.partial(self._keep, name), x=x, w=w, group_sizes=group_sizes)
            return jax.vjp(functools.partial(jax_tsq.grouped_linear, group_sizes=group_sizes), x, w)

        def backward(pullback, dy):
            jax.debug.callback(functools.partial(self._keep, name), dy=dy)
            return *pullback(dy), None

        run.defvjp(forward, backward)
        return run

    def _keep(self, name: str, **arrays) -> None:
        self._arrays[name].update(arrays)

    def layers(self) -> dict[str, Operands]:
        """The operands by the names of the layers, in the order in which they were traced."""
        jax.effects_barrier()
        without = [name for name, arrays in self._arrays.items() if set(arrays) != set(Operands._fields)]
        if without:
            raise ValueError(f"every layer must have run with a gradient; {', '.join(without)} has not.")
        return {name: Operands(**jax.tree.map(jnp.asarray, arrays)) for name, arrays in self._arrays.items()}


class Report(NamedTuple):
    """Of one layer.

    Attributes:
        maxima: of x and of dy, log2 of the maxima of blocks of 128 tokens and a feature; blocks of zeros left out.
        found: for either kind of scales, shares of values that FP8 cuts, and relative errors in the norm.
    """

    maxima: dict[str, np.ndarray]
    found: dict[str, dict[str, float]]


def inspect(layers: dict[str, Operands]) -> dict[str, Report]:
    """A report of each layer."""
    return {name: Report(maxima(o), jax.tree.map(float, measure(*o))) for name, o in layers.items()}


def maxima(operands: Operands) -> dict[str, np.ndarray]:
    """As in a report."""
    found = {}
    for name, a in (("x", operands.x), ("dy", operands.dy)):
        scales = np.asarray(jax_tsq.ragged_transpose_quant(a, operands.group_sizes).scales).ravel()
        found[name] = np.log2(448 * scales[scales != 1])  # of zeros, and of no group, the scale is 1
    return found


@jax.jit
def measure(x: jax.Array, w: jax.Array, group_sizes: jax.Array, dy: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """As in a report."""
    in_use = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]  # anything may lie behind
    x, dy = jnp.where(in_use, x, 0), jnp.where(in_use, dy, 0)
    x32, dy32, w32 = (a.astype(jnp.float32) for a in (x, dy, w))
    along_tokens = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    most: Any = dict(group_sizes=group_sizes, precision=jax.lax.Precision.HIGHEST)
    exact = {
        "x": x32,
        "dy": dy32,
        "y": jnp.where(in_use, jax.lax.ragged_dot(x32, w32, **most), 0),
        "dx": jnp.where(in_use, jax.lax.ragged_dot(dy32, jnp.swapaxes(w32, 1, 2), **most), 0),
        "dW": jax.lax.ragged_dot_general(x32, dy32, ragged_dot_dimension_numbers=along_tokens, **most),
    }

    def fp8(pow_2_scales: bool) -> dict[str, jax.Array]:
        (rows, columns), (dy_rows, dy_columns) = (
            jax_tsq.ragged_quantize(a, group_sizes, pow_2_scales=pow_2_scales) for a in (x, dy)
        )
        weights = jax_tsq.quantize_blocks(w32, pow_2_scales=pow_2_scales)
        found = {
            "x": jax_tsq.dequantize(rows),
            "dy": jax_tsq.dequantize(dy_rows),
            "y": jax_tsq.ragged_matmul(rows, weights, group_sizes),
            "dx": jax_tsq.ragged_matmul(dy_rows, weights, group_sizes, transpose_w=True),
            "dW": jax_tsq.ragged_weight_gradient(columns, dy_columns),
        }
        shares = {
            "x subnormal": subnormal(columns.values),
            "dy subnormal": subnormal(dy_columns.values),
            "dy lost": share((dy != 0) & (dy_rows.values == 0), dy != 0),
        }
        return shares | {name: error(found[name], exact[name]) for name in found}

    return {scales: fp8(pow_2_scales) for scales, pow_2_scales in SCALES.items()}


def error(found: jax.Array, exact: jax.Array) -> jax.Array:
    """Relative, in the norm."""
    difference = jnp.linalg.norm((found.astype(jnp.float32) - exact).ravel())
    return difference / jnp.maximum(jnp.linalg.norm(exact.ravel()), 1e-30)


def share(some: jax.Array, of: jax.Array) -> jax.Array:
    return jnp.sum(some) / jnp.maximum(jnp.sum(of), 1)


def subnormal(values: jax.Array) -> jax.Array:
    """Which share of the FP8 values that are not 0 is subnormal: they have lost bits of their mantissas."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8) & 0x7F
    return share((bits > 0) & (bits < 8), bits > 0)


def table(reports: dict[str, Report]) -> str:
    """A line for each layer and kind of scales, in percent."""
    lines = [f"{'percent':18}{'scales':14}" + "".join(f"{column:>14}" for column in COLUMNS)]
    for name, report in reports.items():
        for scales, found in report.found.items():
            lines.append(f"{name:18}{scales:14}" + "".join(f"{100 * found[column]:14.3f}" for column in COLUMNS))
    return "\n".join(lines)


def draw(reports: dict[str, Report], path: str | Path) -> None:
    """Writes a picture: maxima of blocks, shares of values that FP8 cuts, errors of dW with both kinds of scales."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    (of_x, of_dy), (shares, errors) = figure.subplots(2, 2)
    for panel, operand in ((of_x, "x"), (of_dy, "dy")):
        for name, report in reports.items():
            panel.hist(report.maxima[operand], bins=40, histtype="step", label=name)
        panel.set(title=f"block maxima of {operand}", xlabel="log2 of the maximum", ylabel="blocks")
    place = np.arange(len(reports))
    for i, column in enumerate(("x subnormal", "dy subnormal", "dy lost")):
        heights = [report.found["any"][column] for report in reports.values()]
        shares.bar(place + 0.27 * (i - 1), heights, 0.27, label=column)
    for i, scales in enumerate(SCALES):
        heights = [report.found[scales]["dW"] for report in reports.values()]
        errors.bar(place + 0.4 * (i - 0.5), heights, 0.4, label=f"scales: {scales}")
    for panel, title in ((shares, "share of values"), (errors, "relative error of dW")):
        panel.set(title=title)
        panel.set_xticks(place, list(reports), rotation=20, ha="right", fontsize=8)
    for panel in (of_x, of_dy, shares, errors):
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=100)


EXPERTS, TOP, CONTEXT, FEATURES, HIDDEN, TOKENS = 8, 2, 8, 128, 128, 512


def network(params: dict, windows: jax.Array, recorder: Recorder) -> jax.Array:
    """Logits of the character after each of the windows `[TOKENS, CONTEXT]`, by layers of experts alone."""
    x = params["embedding"][jnp.arange(CONTEXT), windows].sum(axis=1)
    for i, block in enumerate(params["layers"]):
        tokens = x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(tokens @ block["router"]), TOP)
        order = jnp.argsort(chosen.ravel(), stable=True)
        group_sizes = jnp.bincount(chosen.ravel(), length=EXPERTS).astype(jnp.int32)
        rows = tokens.astype(jnp.bfloat16)[order // TOP]
        gate_up = recorder.linear(f"{i} gate and up")(rows, block["gate_up"], group_sizes).astype(jnp.float32)
        gate, up = jnp.split(gate_up, 2, axis=1)
        h = jax.nn.silu(gate) * up * weights.ravel()[order][:, None]
        y = recorder.linear(f"{i} down")(h.astype(jnp.bfloat16), block["down"], group_sizes)
        x += y[jnp.argsort(order)].reshape(len(x), TOP, -1).astype(jnp.float32).sum(axis=1)
    return x @ params["head"]


def demonstration(steps: int) -> dict[str, Operands]:
    """The layers of a small character model, in the last of some steps of training on Python's reference manual."""
    text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode("ascii", "replace"), np.uint8)
    passages = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)
    recorder = Recorder()

    @jax.jit
    def init(key):
        def normal(*shape):
            nonlocal key
            key, subkey = jax.random.split(key)
            return jax.random.normal(subkey, shape, jnp.float32) / shape[-2] ** 0.5

        shapes = dict(router=(FEATURES, EXPERTS), gate_up=(EXPERTS, FEATURES, 2 * HIDDEN))
        shapes |= dict(down=(EXPERTS, HIDDEN, FEATURES))
        layers = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(2)]
        return dict(embedding=normal(CONTEXT, 128, FEATURES), layers=layers, head=normal(FEATURES, 128))

    @jax.jit
    def step(params, batch):
        def loss(params):
            logits = jax.nn.log_softmax(network(params, batch[:, :-1], recorder))
            return -jnp.mean(jnp.take_along_axis(logits, batch[:, -1:], axis=1))

        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params))

    params = init(jax.random.key(0))
    for i in range(steps):
        params = step(params, passages[i * TOKENS : (i + 1) * TOKENS].astype(np.int32))
    return recorder.layers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quantization.png"), help="picture (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of training, at least 1 (default %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1; got {args.steps}.")
    reports = inspect(demonstration(args.steps))
    print(table(reports))
    draw(reports, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
