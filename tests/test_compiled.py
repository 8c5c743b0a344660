"""Inside a compiled program an operation costs its kernel and nothing else."""

import os
import re
import subprocess
import sys

import jax
import pytest
from jax.experimental.layout import Format, Layout

from tests import mesh
from tests.operations import EXAMPLES, Call, Shape

COUNTS = (2,) * 255 + (514,)
NATIVE = [name for name, row in EXAMPLES.items() if row.is_native(jax.devices()[0])]


@pytest.mark.parametrize("name", NATIVE)
def test_one_custom_call_and_no_copies(name):
    """256 experts: the optimized HLO holds one custom call, and nothing that moves or computes data.

    The results lie in memory as native code writes them, since the program's caller does not ask for anything else.
    """
    call = Call(name, Shape(COUNTS, (COUNTS,), features=96))

    def function(*arrays):
        leaves = jax.tree.leaves(call.function(*arrays))
        return list({id(leaf): leaf for leaf in leaves}.values())  # one that is there twice would be copied

    in_place = [i for i, operand in enumerate(call.operands) if operand == "accumulate"]
    # JAX chooses no layout of a result that lies in an argument's memory.
    jitted = jax.jit(function, out_shardings=None if in_place else Format(Layout.AUTO), donate_argnums=in_place)
    hlo = jitted.lower(*call.arrays).compile().as_text()
    assert len(re.findall(r"custom_call_target=\"jax_tsq\.", hlo)) == 1
    operations = set(re.findall(r"^\s+(?:ROOT )?\S+ = .*? ([a-z-]+)\(", hlo, re.MULTILINE))
    assert "custom-call" in operations
    assert operations <= {"parameter", "constant", "custom-call", "get-tuple-element", "tuple", "bitcast"}, operations


def test_changing_buffers():
    """One executable, called many times with inputs and outputs at other addresses, gives the bytes of each input."""
    check_changing_buffers()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="CUDA graphs need a GPU")
def test_changing_buffers_in_a_cuda_graph():
    """The same when XLA records even a single call into a CUDA graph."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_graph_min_graph_size=1"
    environment = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "tests.test_compiled"]
    subprocess.run(command, cwd=mesh.ROOT, env=environment, check=True, timeout=300)


def check_changing_buffers():
    shape = Shape((100, 0, 156), ((30, 200, 0),), features=48, kinds=None)
    programs, kept = [jax.jit(Call(name, shape).function) for name in NATIVE], []
    for i in range(60):
        calls = [Call(name, shape, seed=i) for name in NATIVE]
        arguments = [jax.device_put(call.arrays) for call in calls]
        results = [program(*arrays) for program, arrays in zip(programs, arguments, strict=True)]
        kept.append((arguments, results) if i % 3 else results)  # so that buffers come back at other addresses
        for call, result in zip(calls, results, strict=True):
            call.assert_right(result)


if __name__ == "__main__":
    check_changing_buffers()
