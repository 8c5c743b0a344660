"""`jax.export`: programs that return the public result types, for this platform and for others."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq._core import ffi
from tests import mesh, spec
from tests.cases import assert_same_bytes
from tests.conftest import NATIVE
from tests.mesh import FEATURES, SIZES, TOKENS, Call
from tests.operations import EXAMPLES, OPERATIONS, QUANTIZERS

SPLIT = Call("split")

CHECKS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in OPERATIONS]
EVERY = pytest.mark.parametrize("name", EXAMPLES)


@mesh.parametrize("exports")
def test_mesh(tmp_path_factory, platform, program, case):
    """On meshes, loaded in another process."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


def export(function, *arguments, **options):
    """The function that a serialized and deserialized export calls, and its StableHLO."""
    exported = jax.export.export(jax.jit(function), disabled_checks=CHECKS, **options)(*arguments)
    exported = jax.export.deserialize(exported.serialize())
    return exported.call, exported.mlir_module()


@EVERY
def test_round_trip(ffi_device, name):
    """The result types survive, the bytes are the same."""
    call = Call(name)
    with jax.default_device(ffi_device):
        function, _ = export(call.function, *call.arrays, platforms=[_lowering_platform(ffi_device)])
        call.assert_right(function(*jax.device_put(call.arrays, ffi_device)))


def _lowering_platform(device):
    return "cuda" if device.platform == "gpu" else device.platform


def test_padded_groups():
    """The result of `pad_group_sizes`."""
    call, _ = export(jax_tsq.pad_group_sizes, SIZES)
    groups = call(jnp.asarray(SIZES))
    assert type(groups) is jax_tsq.PaddedGroups
    assert_same_bytes(groups.sizes, np.int32(-(-SIZES // spec.BLOCK) * spec.BLOCK))


def test_without_the_exemption():
    """JAX asks for the exemption, and names the target."""
    with pytest.raises(ValueError, match=r"jax_tsq\.split"):
        jax.export.export(jax.jit(SPLIT.function), platforms=["cpu"])(*SPLIT.arrays)


@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
@EVERY
def test_for_cuda(name):
    """From any machine: the native call if the package was built with CUDA, pure JAX otherwise.

    A kernel for one kind of GPU is chosen where there is one.
    """
    call = Call(name)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), call.arrays)
    _, module = export(call.function, *shapes, platforms=["cuda"])
    for_any = call.row.native.get("cuda", "none") is None
    assert ("@jax_tsq." in module) == (ffi.HAS_CUDA and (for_any or bool(call.native_calls())))


@pytest.mark.skipif(ffi.HAS_CUDA, reason="built with CUDA")
def test_for_cuda_without_cuda_warns_once():
    """A build without CUDA says once in a process that GPUs will run pure JAX."""
    ffi.warn_no_cuda.cache_clear()
    jax.clear_caches()
    with pytest.warns(UserWarning, match="built without CUDA"):
        export(SPLIT.function, *SPLIT.arrays, platforms=["cuda"])
    export(Call("ragged").function, *Call("ragged").arrays, platforms=["cuda"])  # a second warning would be an error


@pytest.mark.parametrize("driver", [12040, 13010, 0])
def test_for_cuda_with_a_driver(monkeypatch, driver):
    """A driver older than the kernels is an error that says what to do; a newer one or none at all is not."""
    monkeypatch.setattr(ffi, "HAS_CUDA", True)
    monkeypatch.setattr(ffi, "_native", types.SimpleNamespace(cuda_versions=lambda: (13000, driver)))
    jax.clear_caches()
    if driver == 12040:
        with pytest.raises(RuntimeError, match=r"by CUDA 13\.0, but .* no more than CUDA 12\.4\. Update the"):
            export(SPLIT.function, *SPLIT.arrays, platforms=["cuda"])
    else:
        export(SPLIT.function, *SPLIT.arrays, platforms=["cuda"])


@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
def test_for_several_platforms():
    """One program for several platforms, pure JAX on those without native code."""
    call, module = export(SPLIT.function, *SPLIT.arrays, platforms=["cpu", "cuda", "tpu"])
    assert "@jax_tsq.split" in module
    _, module = export(SPLIT.function, *SPLIT.arrays, platforms=["tpu"])
    assert "@jax_tsq" not in module
    if "cpu" in NATIVE:
        with jax.default_device(NATIVE["cpu"]):
            SPLIT.assert_right(call(*jax.device_put(SPLIT.arrays, NATIVE["cpu"])))


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "x" in EXAMPLES[name].operands])
def test_symbolic_features(name):
    """The number of features may be symbolic; where blocks of them are counted, as a multiple of 128."""
    call, scope = Call(name), jax.export.SymbolicScope()
    blocks = any("feature_blocks" in call.row.operands[operand] for operand in call.operands)
    symbols = {"features": "128*j" if blocks else "k", "feature_blocks": "j"}

    def shape_of(words, array):
        sizes = [symbols.get(word, str(size)) for word, size in zip(words.split(), array.shape, strict=True)]
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(sizes), scope=scope), array.dtype)

    shapes = [shape_of(call.row.operands[operand], array) for operand, array in call.operands.items()]
    function, _ = export(call.function, *shapes, platforms=["cpu"])
    for features in (128, FEATURES):
        concrete = Call(name, features=features)
        concrete.assert_right(function(*jax.device_put(concrete.arrays, NATIVE["cpu"])))


@pytest.mark.parametrize("setting", ["auto", "portable"])
@pytest.mark.parametrize(("name", "dims"), [("rows", "m, k"), ("blocks", "e, k, n"), ("dual", f"{TOKENS}, k")])
def test_symbolic_sizes(monkeypatch, name, dims, setting):
    """All that fixes no padded length may be symbolic."""
    monkeypatch.setenv("JAX_TSQ_KERNELS", setting)
    jax.clear_caches()
    call = Call(name)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(dims), call.arrays[0].dtype)
    function, module = export(call.function, shape, *call.arrays[1:], platforms=["cpu"])
    assert (f"@jax_tsq.{name}" in module) == (setting == "auto")
    call.assert_right(function(*jax.device_put(call.arrays, NATIVE["cpu"])))


@pytest.mark.parametrize("name", ["split", "ragged", "dual", "rows_sized"])
def test_symbolic_tokens_are_refused(name):
    """The number of tokens is static: it fixes the shapes of the results, or what group sizes may be."""
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 64"), jnp.bfloat16)
    with pytest.raises((TypeError, ValueError), match="m"):
        jax.export.export(jax.jit(Call(name).function))(shape, *Call(name).arrays[1:])
