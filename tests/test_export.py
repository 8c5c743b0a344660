"""`jax.export`: programs that return the public result types, for this platform and for others."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq._core import ffi
from tests import mesh, spec
from tests.cases import assert_same_bytes, float8_e4m3fn, weights
from tests.conftest import NATIVE
from tests.mesh import FEATURES, SIZES, TOKENS, Call, data

TARGETS = ("split", "ragged", "rows", "dual", "blocks")
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in TARGETS]


@mesh.parametrize("exports")
def test_mesh(tmp_path_factory, platform, program, case):
    """On meshes, loaded in another process."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


def export(function, *arguments, **options):
    """The function that a serialized and deserialized export calls, and its StableHLO."""
    exported = jax.export.export(jax.jit(function), disabled_checks=CHECKS, **options)(*arguments)
    exported = jax.export.deserialize(exported.serialize())
    return exported.call, exported.mlir_module()


@pytest.mark.parametrize("operation", mesh.OPERATIONS)
def test_round_trip(ffi_device, operation):
    """The result types survive, the bytes are the same."""
    call = Call(operation)
    with jax.default_device(ffi_device):
        function, _ = export(call.function, *call.arrays, platforms=[_lowering_platform(ffi_device)])
        results = function(*(jax.device_put(array, ffi_device) for array in call.arrays))
    assert type(results) is type(call.expected)
    assert_same_bytes(jax.tree.leaves(results), jax.tree.leaves(call.expected))


def _lowering_platform(device):
    return "cuda" if device.platform == "gpu" else device.platform


def test_other_result_types():
    """`RowQuantized`, `BlockQuantized` and `PaddedGroups`."""
    x, _ = data()

    def function(x, sizes):
        return jax_tsq.quantize_rows(x), jax_tsq.pad_group_sizes(sizes), jax_tsq.quantize_blocks(x[None])

    call, _ = export(function, x, SIZES)
    rows, groups, blocks = call(jnp.asarray(x), jnp.asarray(SIZES))
    types = jax_tsq.RowQuantized, jax_tsq.PaddedGroups, jax_tsq.BlockQuantized
    assert (type(rows), type(groups), type(blocks)) == types
    assert rows.values.shape == x.shape
    assert_same_bytes(groups.sizes, np.int32(-(-SIZES // spec.BLOCK) * spec.BLOCK))


def test_without_the_exemption():
    """JAX asks for the exemption, and names the target."""
    x, _ = data()
    with pytest.raises(ValueError, match=r"jax_tsq\.split"):
        jax.export.export(jax.jit(mesh.split), platforms=["cpu"])(x)


@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
@pytest.mark.parametrize("operation", mesh.OPERATIONS)
def test_for_cuda(operation):
    """From any machine: the native call if the package was built with CUDA, pure JAX otherwise."""
    call = Call(operation)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in call.arrays]
    _, module = export(call.function, *shapes, platforms=["cuda"])
    assert ("@jax_tsq." in module) == ffi.HAS_CUDA


@pytest.mark.skipif(ffi.HAS_CUDA, reason="built with CUDA")
def test_for_cuda_without_cuda_warns_once():
    """A build without CUDA says once in a process that GPUs will run pure JAX."""
    ffi.warn_no_cuda.cache_clear()
    jax.clear_caches()
    x, _ = data()
    with pytest.warns(UserWarning, match="built without CUDA"):
        export(mesh.split, x, platforms=["cuda"])
    export(mesh.ragged, x, SIZES, platforms=["cuda"])  # a second warning would be an error


@pytest.mark.parametrize("driver", [12040, 13010, 0])
def test_for_cuda_with_a_driver(monkeypatch, driver):
    """A driver older than the kernels is an error that says what to do; a newer one or none at all is not."""
    monkeypatch.setattr(ffi, "HAS_CUDA", True)
    monkeypatch.setattr(ffi, "_native", types.SimpleNamespace(cuda_versions=lambda: (13000, driver)))
    jax.clear_caches()
    if driver == 12040:
        with pytest.raises(RuntimeError, match=r"by CUDA 13\.0, but .* no more than CUDA 12\.4\. Update the"):
            export(mesh.split, data()[0], platforms=["cuda"])
    else:
        export(mesh.split, data()[0], platforms=["cuda"])


@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
def test_for_several_platforms():
    """One program for several platforms, pure JAX on those without native code."""
    x, _ = data()
    call, module = export(mesh.split, x, platforms=["cpu", "cuda", "tpu"])
    assert "@jax_tsq.split" in module
    _, module = export(mesh.split, x, platforms=["tpu"])
    assert "@jax_tsq" not in module
    if "cpu" in NATIVE:
        with jax.default_device(NATIVE["cpu"]):
            results = call(jax.device_put(x, NATIVE["cpu"]))
        assert_same_bytes(jax.tree.leaves(results), jax.tree.leaves(mesh.expect_split(x)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("function", ["split", "ragged"])
def test_symbolic_features(function, dtype):
    """The number of features may be symbolic; for fp8 x as a multiple of 128, so that the scales' shape is known."""
    blocks = dtype == float8_e4m3fn
    scope = jax.export.SymbolicScope()
    features = "128*j" if blocks else "k"
    x_shape = jax.export.symbolic_shape(f"{TOKENS}, {features}", scope=scope)
    shapes = [jax.ShapeDtypeStruct(x_shape, dtype)]
    if function == "ragged":
        shapes.append(jax.ShapeDtypeStruct(SIZES.shape, SIZES.dtype))
    if blocks:
        shapes.append(jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"{TOKENS}, j", scope=scope), jnp.float32))
    call, _ = export(getattr(mesh, function), *shapes, platforms=["cpu"])
    for count in (128, FEATURES):
        concrete = Call(function + "_fp8" * blocks, features=count)
        results = call(*jax.device_put(list(concrete.arrays), NATIVE["cpu"]))
        assert_same_bytes(jax.tree.leaves(results), jax.tree.leaves(concrete.expected))


@pytest.mark.parametrize("setting", ["auto", "portable"])
@pytest.mark.parametrize(("operation", "dims"), [("rows", "m, k"), ("blocks", "e, k, n"), ("dual", "384, k")])
def test_symbolic_sizes(monkeypatch, operation, dims, setting):
    """All that fixes no padded length may be symbolic."""
    monkeypatch.setenv("JAX_TSQ_KERNELS", setting)
    jax.clear_caches()
    x, w = data()[0], weights(0, np.float32, 3, 200, 300)
    function, arrays, expected = {
        "rows": (jax_tsq.quantize_rows, [x], spec.rows(x)),
        "dual": (jax_tsq.ragged_quantize, [x, SIZES], spec.dual(x, SIZES)),
        "blocks": (jax_tsq.quantize_blocks, [w], spec.blocks([w])),
    }[operation]
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(dims), arrays[0].dtype)
    call, module = export(function, shape, *arrays[1:], platforms=["cpu"])
    assert (f"@jax_tsq.{operation}" in module) == (setting == "auto")
    results = call(*jax.device_put(arrays, NATIVE["cpu"]))
    assert_same_bytes(jax.tree.leaves(results), list(expected))


@pytest.mark.parametrize("operation", ["split", "ragged", "dual", "rows of groups"])
def test_symbolic_tokens_are_refused(operation):
    """The number of tokens is static: it fixes the shapes of the results, or what group sizes may be."""
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 64"), jnp.bfloat16)
    sizes = [] if operation == "split" else [jnp.asarray(SIZES)]
    others = {"dual": jax_tsq.ragged_quantize, "rows of groups": jax_tsq.quantize_rows}
    function = others.get(operation) or getattr(mesh, operation)
    with pytest.raises((TypeError, ValueError), match="m"):
        jax.export.export(jax.jit(function))(shape, *sizes)
