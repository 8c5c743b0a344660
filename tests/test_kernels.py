"""Which path a call takes: the rule, the setting that forces it, and how a program says what it took."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq._core import ffi, kernels
from tests.cases import assert_same_bytes
from tests.conftest import NATIVE
from tests.mesh import Call, split

SPLIT, WGRAD = (kernels.OPERATIONS[f"jax_tsq.{name}"] for name in ("split", "wgrad"))
CPU = jax.devices("cpu")
CALLS = r"@jax_tsq\."


@pytest.fixture(autouse=True)
def without_setting(monkeypatch):
    monkeypatch.delenv(kernels.SETTING, raising=False)


@pytest.fixture(params=[True, False], ids=["with CUDA", "without CUDA"])
def has_cuda(request, monkeypatch):
    """A build with CUDA kernels and one without."""
    monkeypatch.setattr(ffi, "HAS_CUDA", request.param)
    monkeypatch.setattr(ffi, "check_driver", lambda: None)
    monkeypatch.setattr(ffi, "warn_no_cuda", lambda: None)
    return request.param


def gpus(*capabilities):
    return [SimpleNamespace(platform="gpu", compute_capability=capability) for capability in capabilities]


def operands(features=64, outputs=72, groups=2, batch=()):
    shapes = [(features, 256), (2, features), (outputs, 256), (2, outputs), (groups,)]
    return [jax.ShapeDtypeStruct((*batch, *shape), np.float32) for shape in shapes]


def takes(platform="cuda", devices=(), avals=None, dtype="float32"):
    """Of the weight gradient, whose kernel is for one kind of GPU and for some sizes."""
    return kernels.takes_native(WGRAD, platform, devices, avals or operands(), {"dtype": jnp.dtype(dtype)})


@pytest.mark.parametrize(
    ("devices", "sizes", "dtype", "native"),
    [
        (gpus("9.0"), {}, "float32", True),
        (gpus("9.0", "9.0"), {}, "float32", True),
        (gpus("9.0"), dict(features=66), "float32", False),
        (gpus("9.0"), dict(outputs=68), "float32", True),
        (gpus("9.0"), dict(outputs=68), "bfloat16", False),
        (gpus("9.0"), dict(outputs=70), "float32", False),
        (gpus("9.0"), dict(groups=1024), "float32", True),
        (gpus("9.0"), dict(groups=1025), "float32", False),
        (gpus("9.0"), dict(batch=(3, 5)), "float32", True),
        (gpus("8.0"), {}, "float32", False),
        (gpus("9.0", "10.0"), {}, "float32", False),
        (CPU, {}, "float32", False),
        ([], {}, "float32", False),
    ],
)
def test_choice(has_cuda, devices, sizes, dtype, native):
    """The rule, without a GPU."""
    assert takes(devices=devices, avals=operands(**sizes), dtype=dtype) == (native and has_cuda)


@pytest.mark.parametrize("value", ["auto", ""])
def test_auto(monkeypatch, has_cuda, value):
    """The setting as it is without the variable."""
    monkeypatch.setenv(kernels.SETTING, value)
    assert not takes("cpu", CPU)
    assert takes(devices=gpus("9.0")) == has_cuda


def test_portable(monkeypatch, has_cuda):
    """It is taken wherever the kernel could be, too."""
    monkeypatch.setenv(kernels.SETTING, "portable")
    assert not takes(devices=gpus("9.0"))
    assert not kernels.takes_native(SPLIT, "cpu", CPU, [], {})


NOT_NATIVE = {
    "cpu": (dict(platform="cpu", devices=CPU), "its kernel is for cuda, not for cpu"),
    "another platform": (dict(platform="other platforms", devices=None), "not for other platforms"),
    "another GPU": (dict(devices=gpus("8.0", "9.0")), r"capability 9\.0; got 8\.0, 9\.0"),
    "no GPU": (dict(devices=CPU), r"capability 9\.0; got cpu"),
    "sizes": (dict(devices=gpus("9.0"), avals=operands(features=66)), "K must be a multiple of 4 .*got 66"),
}


@pytest.mark.parametrize(("call", "reason"), NOT_NATIVE.values(), ids=NOT_NATIVE)
def test_native(monkeypatch, has_cuda, call, reason):
    """What cannot be is an error that names the function and the reason, not the other path."""
    monkeypatch.setenv(kernels.SETTING, "native")
    if not has_cuda and call.get("devices") == gpus("9.0"):
        reason = "no CUDA kernels"
    message = f"JAX_TSQ_KERNELS is native, but jax_tsq.ragged_weight_gradient cannot .*{reason}.*to auto"
    with pytest.raises(ValueError, match=message):
        takes(**call)


def test_unknown_setting(monkeypatch):
    """Named, with what it may be."""
    monkeypatch.setenv(kernels.SETTING, "fast")
    with pytest.raises(ValueError, match='JAX_TSQ_KERNELS must be "auto", "native" or "portable"; got "fast"'):
        jax.jit(lambda x: split(x)).lower(Call("split").arrays[0])


def lowered_for_cuda(monkeypatch):
    """The text of a program that holds the persistent kernels, on devices that are taken for the right ones."""
    monkeypatch.setenv(kernels.SETTING, "native")
    monkeypatch.setattr(ffi, "HAS_CUDA", True)
    monkeypatch.setattr(ffi, "check_driver", lambda: None)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in kernels.OPERATIONS]
    call, product = Call("wgrad"), Call("matmul")

    def run(gradient, matmul):
        return call.function(*gradient), product.function(*matmul)

    exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)
    return exported(call.arrays, product.arrays).mlir_module()


@pytest.mark.parametrize(("value", "number"), [(None, 0), ("", 0), ("1", 1), ("112", 112)])
def test_multiprocessors(monkeypatch, value, number):
    """Every persistent kernel gets the number that the variable has when its program is lowered, 0 for all."""
    monkeypatch.delenv(kernels.MULTIPROCESSORS, raising=False)
    if value is not None:
        monkeypatch.setenv(kernels.MULTIPROCESSORS, value)
    text = lowered_for_cuda(monkeypatch)
    found = re.findall(r"@jax_tsq\.(\w+)\(.*multiprocessors = (\d+) : i64", text)
    assert sorted(found) == [("matmul", str(number)), ("wgrad", str(number))]


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", str(2**31)])
def test_bad_multiprocessors(monkeypatch, value):
    """Said on every platform, before anything runs on all of them."""
    monkeypatch.setenv(kernels.MULTIPROCESSORS, value)
    call = Call("matmul")
    message = f'^JAX_TSQ_MULTIPROCESSORS must be a whole number of at least 1; got "{value}".*Unset it'
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda *a: call.function(*a)).lower(*call.arrays)


# --- Programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["native", "portable"])
@pytest.mark.parametrize("operation", ["split_fp8", "ragged"])
def test_quantizers(monkeypatch, ffi_device, operation, setting):
    """Both paths, forced: the same bytes on CPU, and the program says which it is."""
    monkeypatch.setenv(kernels.SETTING, setting)
    call = Call(operation)
    arguments = jax.device_put(call.arrays, ffi_device)
    compiled = jax.jit(lambda *a: call.function(*a)).lower(*arguments).compile()
    name = call.row.function.__name__
    assert jax_tsq.kernels_used(compiled) == ({name: 1} if setting == "native" else {})
    if ffi_device.platform == "cpu" or setting == "native":
        assert_same_bytes(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(call.expected))


def gradient(w, x, sizes):
    return jax.grad(lambda w: jax_tsq.grouped_linear(x, w, sizes).astype(jnp.float32).sum())(w)


def test_a_program(monkeypatch):
    """The operations inside grouped_linear: one without code for CPU fails if it must be native."""
    x, sizes = jnp.ones((384, 64), jnp.bfloat16), jnp.int32([100, 284])
    arguments = jax.device_put((jnp.ones((2, 64, 32)), x, sizes), CPU[0])
    compiled = jax.jit(lambda *a: gradient(*a)).lower(*arguments).compile()
    assert jax_tsq.kernels_used(compiled) == {"ragged_transpose_quant": 2}
    monkeypatch.setenv(kernels.SETTING, "native")
    with pytest.raises(ValueError, match=r"native, but jax_tsq\.ragged_weight_gradient cannot .*not for cpu"):
        jax.jit(lambda *a: gradient(*a)).lower(*arguments)


def test_kernels_used_takes_compiled_programs():
    """A lowered one does not hold the calls that the partitioner will make."""
    lowered = jax.jit(split).lower(Call("split").arrays[0])
    with pytest.raises(TypeError, match=r"^compiled must be .*\.compile\(\); got Lowered"):
        jax_tsq.kernels_used(lowered)


@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
@pytest.mark.parametrize("setting", ["auto", "native", "portable"])
def test_exports(monkeypatch, setting):
    """Whatever the devices here, an export that must be native holds the kernel or fails for want of one."""
    monkeypatch.setenv(kernels.SETTING, setting)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in kernels.OPERATIONS]
    function, x = jax.jit(lambda x: split(x)), jax.device_put(Call("split").arrays[0], CPU[0])

    def module(*platforms):
        return jax.export.export(function, platforms=platforms, disabled_checks=checks)(x).mlir_module()

    assert bool(re.search(CALLS, module("cpu"))) == (setting != "portable")
    if setting != "native":
        assert not re.search(CALLS, module("tpu"))
        assert bool(re.search(CALLS, module("cuda"))) == (setting == "auto" and ffi.HAS_CUDA)
        return
    with pytest.raises(ValueError, match="kernel is for cpu and cuda, not for other platforms"):
        module("cpu", "tpu")
    if ffi.HAS_CUDA:
        assert re.search(CALLS, module("cuda"))
    else:
        with pytest.raises(ValueError, match="no CUDA kernels"):
            module("cuda")


def test_names_in_messages():
    """A message names the public function, and says of a product not that it rounds its input."""
    x = jnp.ones((384, 64), jnp.bfloat16)
    quantized = jax_tsq.ragged_transpose_quant(x, jnp.int32([100, 284]))

    def product(scales):
        return jax_tsq.ragged_weight_gradient(quantized._replace(scales=scales), quantized).sum()

    with pytest.raises(NotImplementedError, match=r"^jax_tsq\.fused_transpose_split_quant rounds its input to float8"):
        jax.jvp(split, (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"^jax_tsq\.ragged_weight_gradient has no derivative"):
        jax.grad(product)(quantized.scales)


def test_every_operation_is_public():
    """What a program is said to hold can be looked up."""
    assert {op.function for op in kernels.OPERATIONS.values()} < set(jax_tsq.__all__)
    assert set(NATIVE) <= {"cpu", "cuda"}
