"""Which implementations the suite compares, and how to call each with numpy arrays.

The platforms that JAX finds decide: the same suite runs the CUDA rows on a machine with a GPU.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes share one GPU

import contextlib
import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import settings

from jax_tsq import (
    _blocks,
    _dual,
    _ragged,
    _rows,
    _split,
    fused_transpose_split_quant,
    quantize_blocks,
    quantize_rows,
    ragged_quantize,
    ragged_transpose_quant,
)
from jax_tsq._core import ffi

# Derandomized: every run on every machine sees the same cases.
settings.register_profile("suite", max_examples=300, derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

collect_ignore = ["processes", "sharding"]  # programs


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One test process gets all cases of a mesh program, since others would wait for it; and all that take much memory.

    Both are told by the names of the tests: xdist's own groups are lost with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            together = re.search(r"[\[-](\w+:\w+)/|::(test_huge)\[", nodeid)
            return together[0] if together else nodeid

    return Scheduling(config, log)


class Implementation:
    """The operations on one device, natively or in pure JAX; arrays may have batch dimensions in front."""

    def __init__(self, name, device):
        self.name, self.device = name, device

    def __repr__(self):
        return self.name

    def split(self, x, input_scales, tokens_per_expert, pow_2_scales=False):
        """Outs and scales, two lists of numpy arrays."""
        function = _jitted_split(self.name == "reference", tuple(tokens_per_expert), pow_2_scales, x.ndim - 2)
        results = self._run(function, x, *([] if input_scales is None else [input_scales]))
        return results[: len(tokens_per_expert)], results[len(tokens_per_expert) :]

    def ragged(self, x, group_sizes, input_scales=None, pow_2_scales=False, aligned=False, layout="packed"):
        """Values, scales and padded sizes, numpy arrays."""
        function = _jitted_ragged(self.name == "reference", pow_2_scales, aligned, layout, x.ndim - 2)
        return self._run(function, x, group_sizes, *([] if input_scales is None else [input_scales]))

    def rows(self, x, group_sizes=None, pow_2_scales=False):
        """Values and scales, numpy arrays."""
        operands = [x, *([] if group_sizes is None else [group_sizes])]
        return self._call(quantize_rows, _rows.reference, 2, operands, dict(aligned=False), pow_2_scales=pow_2_scales)

    def dual(self, x, group_sizes, pow_2_scales=False, aligned=False):
        """Values and scales of the rows, then values, scales and padded sizes of the columns, numpy arrays."""
        options = dict(pow_2_scales=pow_2_scales, aligned=aligned)
        return self._call(ragged_quantize, _dual.reference, 2, [x, group_sizes], {}, **options)

    def blocks(self, weights, pow_2_scales=False):
        """Values, transposed values and scales, numpy arrays."""
        return self._call(_quantize_parts, _blocks.reference, 3, weights, {}, pow_2_scales=pow_2_scales)

    def _call(self, function, reference, rank, operands, hidden, **options):
        """The leaves of a public function's result, or of its reference's, which takes some options more."""
        if self.name == "reference":
            function, rank, options = reference, operands[0].ndim, options | hidden
        jitted = _jitted(function, operands[0].ndim - rank, tuple(options.items()))
        return self._run(jitted, *operands)

    def _run(self, function, *operands):
        results = function(*(jax.device_put(operand, self.device) for operand in operands))
        return [np.array(leaf) for leaf in jax.tree.leaves(results)]


def _batched(function, batch_dims):
    for _ in range(batch_dims):
        function = jax.vmap(function)
    return jax.jit(function)


def _quantize_parts(*weights, pow_2_scales):
    return quantize_blocks(weights, pow_2_scales=pow_2_scales)


@functools.cache
def _jitted(function, batch_dims, options):
    return _batched(functools.partial(function, **dict(options)), batch_dims)


@functools.cache
def _jitted_split(reference, tokens_per_expert, pow_2_scales, batch_dims):
    if reference:
        options = dict(tokens_per_expert=tokens_per_expert, pow_2_scales=pow_2_scales)
        return jax.jit(functools.partial(_split.reference, **options))
    return _batched(
        lambda x, input_scales=None: fused_transpose_split_quant(x, input_scales, tokens_per_expert, pow_2_scales),
        batch_dims,
    )


@functools.cache
def _jitted_ragged(reference, pow_2_scales, aligned, layout, batch_dims):
    options = dict(pow_2_scales=pow_2_scales, aligned=aligned)
    if reference:
        return jax.jit(functools.partial(_ragged.reference, flat=layout == "flat", **options))
    return _batched(
        lambda x, group_sizes, input_scales=None: ragged_transpose_quant(
            x, group_sizes, input_scales=input_scales, layout=layout, **options
        ),
        batch_dims,
    )


def _devices():
    """The first device of each platform that the operations have native code for, where there is one."""
    devices = {}
    for platform in ["cpu", "cuda"]:
        with contextlib.suppress(RuntimeError):
            devices[platform] = jax.devices(platform)[0]
    return devices


DEVICES = _devices()
NATIVE = {platform: device for platform, device in DEVICES.items() if platform == "cpu" or ffi.HAS_CUDA}
IMPLEMENTATIONS = [Implementation(f"native {platform}", device) for platform, device in NATIVE.items()]
if "cpu" in DEVICES:  # elsewhere XLA may divide and flush as it likes
    IMPLEMENTATIONS.append(Implementation("reference", DEVICES["cpu"]))


@pytest.fixture(scope="session", params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    """Native code on every platform that is present, and the pure-JAX version on CPU."""
    return request.param


@pytest.fixture(scope="session", params=NATIVE.values(), ids=NATIVE)
def ffi_device(request):
    """Devices whose FFI targets are registered."""
    return request.param


@pytest.fixture(scope="session", params=DEVICES.values(), ids=DEVICES)
def device(request):
    """Devices to run pure-JAX functions on."""
    return request.param
