"""Groups of cases that run in a process of their own, on 8 host devices or on the GPUs that are there.

An abort inside XLA then fails the cases of its group and not the test suite. A group is a program in `sharding/`,
which also runs by itself: `python -m tests.sharding.<program> [part of a case's name ...]`.
"""

import fcntl
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import operations
from tests.cases import assert_same_bytes
from tests.operations import Shape

ROOT = pathlib.Path(__file__).parents[1]
# Compiled in a hurry: the programs run for a few steps. What the operations themselves compute is compared without it.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# --- The side of pytest ----------------------------------------------------------------------------------------------


def load(program):
    """The module of a program, without running it."""
    return importlib.import_module(f"tests.sharding.{program}")


def case_names(program):
    """The cases of a program."""
    return list(load(program).CASES.functions)


def parametrize(*programs):
    """A test for each case of these programs on each platform: `platform`, `program`, `case`."""
    from tests.conftest import NATIVE

    every = itertools.product(NATIVE, [(program, case) for program in programs for case in case_names(program)])
    names = [(platform, program, case) for platform, (program, case) in every]
    # conftest.py finds in the ids which tests belong together.
    ids = [f"{platform}:{program}/{case}" for platform, program, case in names]
    return pytest.mark.parametrize(("platform", "program", "case"), names, ids=ids)


def run(program, platform, *arguments):
    """Runs a program; returns a dict from case names to None or an error, and what the process left behind."""
    environment, flags = dict(os.environ), "--xla_gpu_deterministic_ops=true"  # XLA's own scatters are not
    if platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        flags = f"--xla_force_host_platform_device_count=8 {QUICK}"
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    command = [sys.executable, "-m", f"tests.sharding.{program}", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"case"')]
    results = {result["case"]: result["error"] for result in map(json.loads, lines)}
    return {"results": results, "status": f"exit status {process.returncode}\n{process.stderr[-4000:]}"}


def run_once(tmp_path_factory, program, platform):
    """`run`, once for all processes of a test run."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    result = directory / f"{program}-{platform}.json"
    with open(directory / f"{program}-{platform}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(json.dumps(run(program, platform)))
    return json.loads(result.read_text())


def check_case(outcome, case):
    """Fails if a case failed, or if its process ended before it."""
    assert case in outcome["results"], f"no result: {outcome['status']}"
    error = outcome["results"][case]
    assert error is None, error


# --- The side of the programs ----------------------------------------------------------------------------------------


class Cases:
    """The cases of a program: functions, each for all combinations of the parameters that it is registered with."""

    def __init__(self):
        self.functions = {}

    def add(self, **parameters):
        def register(function):
            for values in list(itertools.product(*parameters.values()))[:: 2 if operations.FEW else 1]:
                self.functions["-".join([function.__name__, *map(str, values)])] = functools.partial(function, *values)
            return function

        return register

    def main(self):
        """Runs all cases, or those whose names hold a command line argument, and prints one line for each."""
        warnings.simplefilter("error")
        for case, function in self.functions.items():
            if sys.argv[1:] and not any(part in case for part in sys.argv[1:]):
                continue
            start, error = time.perf_counter(), None
            try:
                function()
            except (Exception, pytest.fail.Exception):  # the latter is a BaseException
                error = traceback.format_exc()
            seconds = round(time.perf_counter() - start, 2)
            print(json.dumps({"case": case, "error": error, "seconds": seconds}), flush=True)


AXIS_TYPES = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}
KINDS = tuple(AXIS_TYPES)


def make_mesh(kind, devices=None):
    """A mesh of all devices: 2 x 4 where there are 8, in other numbers what comes close. Axes `e` and `t`."""
    devices = jax.devices() if devices is None else devices
    rows = 2 if len(devices) % 2 == 0 and len(devices) > 2 else 1
    return jax.sharding.Mesh(np.reshape(devices, (rows, -1)), ("e", "t"), axis_types=AXIS_TYPES[kind])


def make_cube(axis_types):
    """A mesh with three axes `a`, `b` and `c`, of two devices each where there are as many."""
    shape = [2 if len(jax.devices()) % (2 << i) == 0 else 1 for i in range(3)]
    devices = np.reshape(jax.devices()[: np.prod(shape)], shape)
    return jax.sharding.Mesh(devices, ("a", "b", "c"), axis_types=tuple(AxisType[name] for name in axis_types))


def put(x, mesh, *axes):
    """A numpy array on a mesh; each process puts what its own devices hold."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*axes)), lambda index: x[index])


# M tokens of K features in groups: an empty one, a partial block, a whole block.
TOKENS, FEATURES = 384, 1024
COUNTS = (128, 0, 100, 156)
SIZES = np.int32([100, 0, 130, 99])
EXPERTS = 4
BATCH_SIZES = np.stack([np.roll(SIZES, i) for i in range(EXPERTS)])
SHAPE = Shape(COUNTS, tuple(map(tuple, BATCH_SIZES.tolist())), FEATURES)


class Call(operations.Call):
    """A call whose arrays go on a mesh; `SHAPE` says its sizes, where it is not told others."""

    def __init__(self, name, batch=(), **sizes):
        super().__init__(name, SHAPE._replace(**sizes), batch)

    def put(self, mesh, **axes):
        """The arrays, on the mesh axes that `operand_specs` takes."""
        return jax.tree.map(lambda array, spec: put(array, mesh, *spec), self.arrays, self.operand_specs(**axes))

    def check(self, mesh, axes=None, **options):
        """`check` of the call, whose arrays and results lie on these axes where the options say no more."""
        axes = axes or {}
        what = dict(function=self.function, arguments=self.put(mesh, **axes), specs=self.specs(**axes))
        how = dict(calls=self.native_calls(), same=self.row.assert_same)
        return check(**dict(expected=self.expected, mesh=mesh, **what, **how) | options)


def split(x, input_scales=None):
    return jax_tsq.fused_transpose_split_quant(x, input_scales, COUNTS)


COLLECTIVES = re.compile(
    r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|collective-broadcast)(-start)?\("
)


def collectives(compiled):
    """Names of the communicating instructions of a compiled program, each as often as it stands there."""
    return sorted(name for name, _ in COLLECTIVES.findall(compiled.as_text()))


def custom_calls(compiled):
    return sum(jax_tsq.kernels_used(compiled).values())


@jax.custom_vjp
def _keeps_quantized(x):
    return x


_keeps_quantized.defvjp(
    lambda x: (x, split(x)),
    lambda residuals, gradient: (gradient + residuals.scales[0][0].astype(gradient.dtype),),
)


def gradient_with_quantized_residuals(x):
    """Gradient of a custom_vjp under jax.checkpoint that keeps a split result: one plus the scales of a block."""
    return jax.grad(lambda x: jax.checkpoint(_keeps_quantized)(x).astype(jnp.float32).sum())(x)


def check(
    function,
    arguments,
    expected,
    *,
    mesh,
    specs=None,
    communication=(),
    calls=1,
    same=assert_same_bytes,
    eager=False,
    **jit_options,
):
    """Checks bytes, communication, the number of native calls and the results' shardings and types.

    Args:
        specs: a tuple of axes for each result, a tree like the results or one for all.
        communication: the collectives that the compiled program must hold, or None for any.
        same: compares what one device holds with the same part of what is expected.
        eager: whether to run the function without jit, too.
    """
    compiled = jax.jit(function, **jit_options).lower(*arguments).compile()
    text = compiled.as_text()
    if communication is not None:
        wanted = sorted(communication) if mesh.size > 1 else []
        assert collectives(compiled) == wanted, f"{collectives(compiled)}, not {wanted}, in\n{text}"
    assert custom_calls(compiled) == calls, f"{custom_calls(compiled)} custom calls in\n{text}"
    for results in [compiled(*arguments), *([function(*arguments)] if eager else [])]:
        results_leaves, expected_leaves = jax.tree.leaves(results), jax.tree.leaves(expected)
        _check_shards(results_leaves, expected_leaves, same)
        if specs is not None:
            _check_shardings(results_leaves, mesh, jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)))
    return results


def _check_shards(results, expected, same):
    """Checks what every device of this process holds, copies included."""
    for result, whole in zip(results, map(np.asarray, expected), strict=True):
        assert (result.dtype, result.shape) == (whole.dtype, whole.shape)
        for shard in result.addressable_shards:
            same(shard.data, whole[shard.index])


def _check_shardings(results, mesh, specs):
    specs = specs * len(results) if len(specs) == 1 else specs
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    for result, axes in zip(results, specs, strict=True):
        if not result.size:  # JAX reports those as replicated
            continue
        expected = NamedSharding(mesh, axes)
        assert result.sharding.is_equivalent_to(expected, result.ndim), f"{result.sharding}, not {expected}"
        named = [axis if isinstance(axis, tuple) else (axis,) for axis in axes]
        typed = P(*(tuple(a for a in axis if a in explicit) or None for axis in named))
        if mesh.size > 1 and explicit:
            in_type = jax.typeof(result).sharding
            message = f"type {jax.typeof(result)}, not {typed}"
            assert in_type.is_equivalent_to(NamedSharding(in_type.mesh, typed), result.ndim), message


def compile_seconds(function, *arguments):
    """Processor seconds of the shorter of two compilations, and the compiled program."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        compiled = jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
        seconds.append(time.process_time() - start)
    return min(seconds), compiled
