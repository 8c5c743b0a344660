"""The package loaded again, as notebooks do: nothing is registered twice, old results are still results."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys
import jax, jax.numpy as jnp, numpy as np
import jax_tsq

x, sizes = jnp.ones((256, 8), jnp.bfloat16), jnp.array([100, 156], jnp.int32)
before = jax_tsq.ragged_transpose_quant(x, sizes)
names = [name for name in sys.modules if name.split(".")[0] == "jax_tsq"]
if sys.argv[1] == "forgotten":
    for name in names:
        del sys.modules[name]
    import jax_tsq
else:
    for name in names[:: 1 if sys.argv[1] == "reloaded" else -1]:
        importlib.reload(sys.modules[name])

after = jax_tsq.ragged_transpose_quant(x, sizes)
assert type(before) is type(after) is jax_tsq.RaggedQuantized
dw = jax_tsq.ragged_weight_gradient(before, after)
np.testing.assert_allclose(dw[:, 0, 0], [100, 156], rtol=1e-2)
np.testing.assert_array_equal(jax_tsq.dequantize(before), jax_tsq.dequantize(after))
checks = [jax.export.DisabledSafetyCheck.custom_call("jax_tsq.ragged")]
exported = jax.export.export(jax.jit(jax_tsq.ragged_transpose_quant), disabled_checks=checks)(x, sizes)
assert type(jax.export.deserialize(exported.serialize()).call(x, sizes)) is jax_tsq.RaggedQuantized
"""


@pytest.mark.parametrize("way", ["reloaded", "reloaded backwards", "forgotten"])
def test_loaded_again(way):
    """Everything works, together with a result from before."""
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, way], check=True, timeout=300)
