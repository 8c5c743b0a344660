"""Inside a compiled program an operation costs its kernel and nothing else."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import mesh, spec

COUNTS = (2,) * 255 + (514,)


def split(x):
    return jax_tsq.fused_transpose_split_quant(x, None, COUNTS)


def ragged(x):
    return jax_tsq.ragged_transpose_quant(x, jnp.asarray(COUNTS, jnp.int32))


@pytest.mark.parametrize("operation", [split, ragged])
def test_one_custom_call_and_no_copies(operation):
    """256 experts: the optimized HLO holds one custom call, and nothing that moves or computes data."""
    x = jax.ShapeDtypeStruct((sum(COUNTS), 96), jnp.bfloat16)
    hlo = jax.jit(operation).lower(x).compile().as_text()
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
    counts, sizes = [100, 0, 156], jnp.array([30, 200, 0], jnp.int32)
    one = jax.jit(lambda x: jax_tsq.fused_transpose_split_quant(x, None, counts))
    other = jax.jit(lambda x: jax_tsq.ragged_transpose_quant(x, sizes))
    kept, rng = [], np.random.default_rng(0)
    for i in range(60):
        x = jnp.asarray(rng.normal(size=(256, 48)) * 2.0**i, jnp.bfloat16)
        got = one(x), other(x)
        kept.append((x, got) if i % 3 else got)  # so that buffers come back at other addresses
        outs, scales = spec.split(np.asarray(x), None, counts, False)
        for a, b in zip(jax.tree.leaves(got[0]), [*outs, *scales], strict=True):
            assert np.asarray(a).tobytes() == b.tobytes()
        for a, b in zip(
            got[1], spec.ragged(np.asarray(x), np.asarray(sizes), None, False, False, "packed"), strict=True
        ):
            assert np.asarray(a).tobytes() == b.tobytes()


if __name__ == "__main__":
    check_changing_buffers()
