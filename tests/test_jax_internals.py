"""JAX's private names: one that has moved is an error, not a slower program."""

import importlib
import re
from pathlib import Path

import jax
import pytest

import jax_tsq
from jax_tsq._core import jax_internals

NAMES = {
    "prim_requires_devices_during_lowering": "jax._src.dispatch.prim_requires_devices_during_lowering",
    "deserialization_registry": "jax._src.export._export.deserialization_registry",
    "GSPMDSharding": "jax._src.sharding_impls.GSPMDSharding",
    "parse_flatten_op_sharding": "jax._src.sharding_impls.parse_flatten_op_sharding",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_gone(monkeypatch, name):
    """An error at import, which says what to do."""
    monkeypatch.delattr(NAMES[name])
    with pytest.raises(ImportError, match=rf"has moved an internal .*{name}.*upgrade jax_tsq"):
        importlib.reload(jax_internals)


def test_a_method_that_is_gone(monkeypatch):
    """The same."""
    for owner in (jax_internals.GSPMDSharding, jax.sharding.Sharding):
        monkeypatch.delattr(owner, "_to_xla_hlo_sharding")
    with pytest.raises(ImportError, match=r"has moved an internal .*_to_xla_hlo_sharding.*upgrade jax_tsq"):
        importlib.reload(jax_internals)


def test_all_are_in_one_file():
    """No other file of the package has one."""
    files = Path(jax_tsq.__file__).parent.rglob("*.py")
    private = re.compile(r"\b(jax|jaxlib)\._[a-z]")
    assert [file.name for file in files if private.search(file.read_text())] == ["jax_internals.py"]
