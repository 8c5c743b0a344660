"""The self-check, `python -m jax_tsq`."""

import itertools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jax_tsq
from jax_tsq import __main__ as self_check

ON_GPU = jax.devices()[0].platform == "gpu"


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_self_check(monkeypatch, capsys, right):
    """Whether bytes are right, and times: of the device and, apart from it, of the host on a GPU, else wall time."""
    sizes = ["--tokens", "64", "--features", "64", "--experts", "2", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["jax_tsq", *sizes])
    cases = self_check._cases
    monkeypatch.setattr(self_check, "_cases", lambda *arguments: itertools.islice(cases(*arguments), 1))
    if not right:
        monkeypatch.setattr(self_check, "_same_bytes", lambda a, b: False)
    assert self_check.main() == (0 if right else 1)
    printed = capsys.readouterr()
    (row,) = [line.split() for line in printed.out.splitlines() if line.startswith("split bf16 ")]
    *_, same, _, milliseconds, _, of_copy, host = row
    assert same == ("equal" if right else "DIFFER") and ("FAILED" in printed.err) == (not right)
    assert float(milliseconds) > 0
    assert (of_copy.endswith("%") and float(host) > 0) if ON_GPU else (of_copy, host) == ("-", "-")


def test_cases():
    """Every function that quantizes is among them; references give the bytes of functions, which come back as x."""
    x = jax.random.normal(jax.random.key(0), (48, 200), jnp.bfloat16)
    seen = []
    for name, f, operands, reference, restore in self_check._cases(x, jax.jit(jax_tsq.quantize_rows)(x), [20, 0, 28]):
        result = jax.jit(f)(*operands)
        assert self_check._same_bytes(jax.tree.leaves(result), reference(*operands)), name
        assert jnp.linalg.norm(restore(result) - x) < 0.06 * jnp.linalg.norm(x.astype(jnp.float32)), name
        seen.append(type(result).__name__)
    of_tokens = ["SplitQuantized", "SplitQuantized", "RaggedQuantized"]  # bf16, then fp8
    assert seen == [*of_tokens, *of_tokens, "RowQuantized", "tuple", "BlockQuantized"]


def events(*durations):
    stats = [("hlo_module", "jit_operation")], [("hlo_module", "jit_copy")], []
    return [SimpleNamespace(stats=s, duration_ns=1e9 * d) for s, d in zip(stats, durations, strict=True)]


def test_device_seconds(monkeypatch):
    """Kernels count for the module that they belong to, on the streams of GPUs alone."""
    call = self_check._call("operation", jnp.sin, jnp.ones(3))
    assert set(self_check._device_seconds([call], 1)) == ({"operation"} if ON_GPU else set())

    lines = [
        SimpleNamespace(name="Stream #13", events=events(2, 4, 8)),
        SimpleNamespace(name="XLA", events=events(1, 1, 1)),
    ]
    planes = [SimpleNamespace(name=name, lines=lines) for name in ("/device:GPU:0", "/host:CPU")]
    profile = SimpleNamespace(planes=planes)
    monkeypatch.setattr(jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: profile))
    seconds = self_check._device_seconds([call], 2)
    assert (seconds["operation"], seconds["copy"]) == pytest.approx((1, 2))
