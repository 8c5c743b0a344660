"""Which implementations the suite compares, and how to call each with numpy arrays.

The platforms that JAX finds decide: the same suite runs the CUDA rows on a machine with a GPU.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes share one GPU

import contextlib
import functools
import inspect
import re
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import settings

from jax_tsq._core import ffi, kernels
from tests.operations import OPERATIONS

# Derandomized: every run on every machine sees the same cases.
settings.register_profile("suite", max_examples=60, derandomize=True, deadline=None, database=None)
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
    """The operations on one device, natively or in pure JAX; arrays may have batch dimensions in front.

    A method for each row of `OPERATIONS` takes what its specification takes, and returns the public result with numpy
    arrays.
    """

    def __init__(self, name, device):
        self.name, self.device = name, device

    def __repr__(self):
        return self.name

    def __getattr__(self, operation):
        if operation not in OPERATIONS:
            raise AttributeError(operation)
        return functools.partial(self._call, OPERATIONS[operation])

    def _call(self, row, *args, **kwargs):
        arguments = inspect.signature(row.specification).bind(*args, **kwargs).arguments
        given = {name: value for name, value in arguments.items() if value is not None}
        operands = {name: given.pop(name) for name in row.operands if name in given}
        name = next(iter(operands))
        dims, first = (jax.tree.leaves(tree[name])[0] for tree in (row.operands, operands))
        options = {name: tuple(value) if name == "tokens_per_expert" else value for name, value in given.items()}
        function = _jitted(self.name, row.function, first.ndim - len(dims.split()), tuple(options.items()))
        setting = {kernels.SETTING: "portable" if self.name == "reference" else "native"}
        with mock.patch.dict(os.environ, setting):
            results = function(jax.device_put(dict.fromkeys(row.operands) | operands, self.device))
        return jax.tree.map(np.array, results)


@functools.cache
def _jitted(implementation, function, batch_dims, options):
    """A public function that takes its operands as one dict, for one implementation."""

    def run(operands):
        return function(**operands, **dict(options))

    for _ in range(batch_dims):
        run = jax.vmap(run)
    return jax.jit(run)


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
