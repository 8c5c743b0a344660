"""Expert weight gradients from FP8 operands, on real text.

The text of Python's own documentation is embedded, routed to the top 2 of 8 experts and sorted by expert. The weight
gradient of an expert, dW = X^T dY, contracts over tokens, so both operands are quantized along tokens: with static
counts by `fused_transpose_split_quant`, with traced group sizes by `ragged_transpose_quant`. Both are compared with the
gradient of float32 operands, next to what bfloat16 operands give.

    python examples/moe_weight_gradient.py
"""

import argparse
import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq

EXPERTS, TOP = 8, 2
CONTEXT = 8  # characters that make up one token


def routed_tokens(tokens: int, features: int, outputs: int):
    """Returns X `[2 * tokens, K]`, dY `[2 * tokens, N]`, both sorted by expert, and the experts' token counts."""
    text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode("ascii", "replace"), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)[:tokens]
    characters, target = jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1])
    keys = jax.random.split(jax.random.key(0), 5)

    embedding = jax.random.normal(keys[0], (CONTEXT, 128, features)) / CONTEXT**0.5
    x = embedding[jnp.arange(CONTEXT), characters].sum(axis=1)
    router = jax.random.normal(keys[1], (features, EXPERTS)) / features**0.5
    weight, expert = jax.lax.top_k(jax.nn.softmax(x @ router), TOP)
    experts = jax.random.normal(keys[2], (EXPERTS, features, outputs)) / features**0.5
    head = jax.random.normal(keys[3], (outputs, 128)) / outputs**0.5

    # Every token appears once for each of its experts; sorting brings those of an expert together.
    order = jnp.argsort(expert.reshape(-1), stable=True)
    token, counts = order // TOP, np.bincount(np.asarray(expert).reshape(-1), minlength=EXPERTS)
    sorted_x, sorted_weight = x[token].astype(jnp.bfloat16), weight.reshape(-1)[order]
    y = jax.lax.ragged_dot(sorted_x, experts.astype(jnp.bfloat16), jnp.asarray(counts, jnp.int32))

    def loss(y):
        mixed = jax.ops.segment_sum(jax.nn.silu(y.astype(jnp.float32)) * sorted_weight[:, None], token, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(mixed @ head), target[:, None].astype(int), 1))

    return sorted_x, jax.grad(loss)(y).astype(jnp.bfloat16), counts.tolist()


@functools.partial(jax.jit, static_argnames=("counts", "pow_2_scales"))
def split_operands(x, dy, counts, pow_2_scales):
    """X and dY of every expert, quantized with static counts: a compilation for each routing."""
    x, dy = (jax_tsq.fused_transpose_split_quant(a, None, counts, pow_2_scales) for a in (x, dy))
    return jax_tsq.dequantize(x), jax_tsq.dequantize(dy)


def products(x, dy):
    """dW `[E, K, N]` of the experts' X and dY, in float32 on the host."""
    return np.stack([np.asarray(a, np.float32).T @ np.asarray(b, np.float32) for a, b in zip(x, dy, strict=True)])


WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@functools.partial(jax.jit, static_argnames="pow_2_scales")
def ragged_gradient(x, dy, group_sizes, pow_2_scales):
    """dW `[E, K, N]` with traced group sizes: one compilation for all routings."""
    a, b = (jax_tsq.ragged_transpose_quant(operand, group_sizes, pow_2_scales=pow_2_scales) for operand in (x, dy))
    return jax.lax.ragged_dot_general(jax_tsq.dequantize(a), jax_tsq.dequantize(b), a.padded_sizes, WEIGHT_GRADIENT)


def main():
    parser = argparse.ArgumentParser(description="Expert weight gradients from FP8 operands, on real text.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=384)
    args = parser.parse_args()

    jax.config.update("jax_default_matmul_precision", "highest")
    x, dy, counts = routed_tokens(args.tokens, args.features, args.outputs)
    sizes, ends = jnp.asarray(counts, jnp.int32), np.cumsum(counts)
    print(f"{args.tokens} tokens, top {TOP} of {EXPERTS} experts: {counts} tokens each")

    wanted = products(*(np.split(np.asarray(a), ends[:-1]) for a in (x, dy)))
    print(f"{'dW from':40}{'relative error':>16}{'worst expert':>14}")
    for name, got in (
        ("bf16 operands, bf16 result", jnp.asarray(wanted, jnp.bfloat16)),
        ("split, FP8", products(*split_operands(x, dy, tuple(counts), False))),
        ("split, FP8, power-of-two scales", products(*split_operands(x, dy, tuple(counts), True))),
        ("ragged, FP8", ragged_gradient(x, dy, sizes, False)),
        ("ragged, FP8, power-of-two scales", ragged_gradient(x, dy, sizes, True)),
    ):
        difference = np.asarray(got, np.float32) - wanted
        by_expert = [np.linalg.norm(d) / np.linalg.norm(w) for d, w in zip(difference, wanted, strict=True)]
        print(f"{name:40}{np.linalg.norm(difference) / np.linalg.norm(wanted):16.4f}{max(by_expert):14.4f}")


if __name__ == "__main__":
    main()
