"""What compiled programs hold around native calls that hand row scales to each other."""

import functools
import re

import jax
import jax.numpy as jnp

import jax_tsq
from jax_tsq._core import ffi, kernels, primitive
from jax_tsq._core.numerics import FP8
from jax_tsq._core.primitive import Operation, Result

FREE = {"parameter", "constant", "custom-call", "get-tuple-element", "tuple", "bitcast"}
"""Instructions that move no data, and the calls themselves."""


@functools.cache
def _toy():
    """An operation that takes row scales as products do. It is compiled and never run, so any handler will do."""
    for platform, handler in {platform: handler for platform, _, handler in ffi._native.targets()}.items():
        jax.ffi.register_ffi_target("jax_tsq.toy", handler, platform=platform)
    toy = Operation(
        name="toy",
        function="toy",
        operands=(("tokens", "features"), ("tokens", "feature_blocks")),
        results=lambda values, scales: [Result(("tokens", "features"), values, FP8)],
        reference=lambda values, scales: [values],
        parallel=lambda *_: ("tokens", "features"),
        blocks={"feature_blocks": "features"},
        column_major=(("tokens", "feature_blocks"),),
    )
    defined = primitive.define(toy)
    del kernels.OPERATIONS[toy.target]  # which lists the package's own
    return defined


def consume(rows):
    return primitive.bind(_toy(), *rows)[0]


def quantize_and_consume(x):
    """Two native calls, of which one gives scales to the other."""
    return consume(jax_tsq.quantize_rows(x))


def quantize_both_and_consume(x, group_sizes):
    """The same with columns beside."""
    rows, columns = jax_tsq.ragged_quantize(x, group_sizes)
    return consume(rows), columns


def consume_in_a_loop(x):
    """Scales that are the carry of a loop."""

    def step(rows, _):
        return jax_tsq.quantize_rows(consume(rows).astype(jnp.bfloat16)), None

    return jax.lax.scan(step, jax_tsq.quantize_rows(x), length=4)[0].values


def instructions(compiled):
    """Name and result type of each instruction of a compiled program."""
    found = re.findall(r"^\s+(?:ROOT )?\S+ = (.*?) ([a-z-]+)\(", compiled.as_text(), re.MULTILINE)
    return [(name, result) for result, name in found]


def calls(compiled):
    """Names of the native calls of a compiled program, in alphabetical order."""
    return sorted(re.findall(r'custom_call_target="jax_tsq\.(\w+)"', compiled.as_text()))


def check_no_copies(compiled, quantizer="rows"):
    """Checks that a program is a quantizer's call, one of the toy, and nothing that moves or computes data."""
    assert calls(compiled) == sorted([quantizer, "toy"]), compiled.as_text()
    moving = {name for name, _ in instructions(compiled)} - FREE
    assert not moving, f"{moving} in\n{compiled.as_text()}"
