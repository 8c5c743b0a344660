"""Long use: no growth, no leaks, the same bytes from many threads and processes.

JAX_TSQ_LOAD_SECONDS says how long the loop runs; 3600 is the run before a release.
"""

import concurrent.futures
import contextlib
import gc
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.operations import EXAMPLES, QUANTIZERS, Call, Shape

SECONDS = float(os.environ.get("JAX_TSQ_LOAD_SECONDS", "10"))
MOST_GROWTH = 32 << 20  # bytes of host memory
GROWTH_OF_A_PROGRAM = 32 << 10  # what JAX keeps of each; 9 KiB were seen with other operations in the place of ours
MOST_NEW_THREADS = 16  # pools of XLA's that are still filling


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thread_count():
    return len(os.listdir("/proc/self/task"))


def state(device):
    """What must not grow: open files, live arrays and device memory in use."""
    stats = device.memory_stats() or {}
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "arrays": len(jax.live_arrays()),
        "device bytes": stats.get("bytes_in_use", 0),
    }


class Problem:
    """A program for one random shape, and calls of it with random data and routings."""

    def __init__(self, rng, device):
        self.device = device
        self.row = EXAMPLES[rng.choice([name for name in QUANTIZERS if EXAMPLES[name].is_native(device)])]
        counts = rng.multinomial(int(rng.integers(1, 600)), rng.dirichlet(np.ones(int(rng.integers(1, 6)))))
        self.shape = Shape(tuple(counts.tolist()), (), int(rng.choice([1, 8, 33, 128, 200])), kinds=None)
        self.options = dict(self.row.options(self.shape), pow_2_scales=bool(rng.integers(2)))
        self.operands = jax.device_put(self.draw(rng), device)
        function = jax.jit(lambda operands: self.row.call(**operands, **self.options))
        self.program = function.lower(self.operands).compile()

    def draw(self, rng):
        shape = self.shape._replace(sizes=(rng.permutation(self.shape.counts).tolist(),))
        drawn = self.row.draw(shape, int(rng.integers(2**32)))
        return {name: array for name, array in zip(self.row.operands, drawn, strict=False) if array is not None}

    def check(self, rng):
        operands = self.draw(rng)
        result = self.program(jax.device_put(operands, self.device))
        self.row.assert_same(result, self.row.expect(**operands, **self.options))

    def repeat(self, times):
        for _ in range(times):
            jax.block_until_ready(self.program(self.operands))


def test_loop(ffi_device):
    """Random shapes in one process, each compiled, called with new data, called again and forgotten."""
    rng = np.random.default_rng(0)

    def round_():
        problem = Problem(rng, ffi_device)
        for _ in range(3):
            problem.check(rng)
        problem.repeat(100)

    def measure():
        jax.clear_caches()
        gc.collect()
        return resident_bytes(), thread_count(), state(ffi_device)

    start = time.monotonic()
    while time.monotonic() < start + SECONDS / 3:  # caches, pools and the allocator fill
        round_()
    bytes_before, threads_before, wanted = measure()
    rounds = 0
    while time.monotonic() < start + SECONDS:
        round_()
        rounds += 1
    bytes_after, threads_after, found = measure()
    growth, threads = bytes_after - bytes_before, threads_after - threads_before
    print(f"{rounds} rounds of 103 calls, host memory grew by {growth / 2**20:.1f} MiB, threads by {threads}, {found}")
    assert found == wanted
    assert growth < MOST_GROWTH + rounds * GROWTH_OF_A_PROGRAM and threads < MOST_NEW_THREADS


def test_calls_keep_nothing(ffi_device):
    """10,000 calls of one compiled program leave host and device memory as they were, errors included."""
    rng = np.random.default_rng(1)
    problem = Problem(rng, ffi_device)
    x = jax.device_put(np.ones([3, 5], np.float32), ffi_device)
    call = jax.ffi.ffi_call("jax_tsq.split", [jax.ShapeDtypeStruct((5, 3), jnp.float8_e4m3fn)] * 2)
    wrong = jax.jit(lambda x: call(x, pow_2_scales=False))

    def run(times):
        problem.repeat(times)
        for _ in range(times // 20):
            with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
                jax.block_until_ready(wrong(x))

    run(1000)
    before, wanted = resident_bytes(), state(ffi_device)
    run(10000)
    assert state(ffi_device) == wanted
    assert resident_bytes() - before < MOST_GROWTH / 4


def test_layers_keep_nothing(ffi_device):
    """Training steps of an expert block and a layer, each with another routing: memory does not grow.

    36,000 of them on a GPU, as many as steps of 100 ms in an hour.
    """
    rng, tokens, features, groups = np.random.default_rng(2), 256, 128, 4
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16)  # noqa: E731

    def loss(params, x, sizes):
        y = jax_tsq.moe_mlp(x, *params["block"], sizes)
        return jnp.sum(jax_tsq.grouped_linear(y, params["layer"], sizes).astype(jnp.float32) ** 2)

    def step(params, x, sizes):
        gradients = jax.grad(loss)(params, x, sizes)
        return jax.tree.map(lambda p, g: p - (g * 1e-3).astype(p.dtype), params, gradients)

    square = (groups, features, features)
    params = {"block": (draw(groups, features, 2 * features), draw(*square)), "layer": draw(*square)}
    x = draw(tokens, features)
    cuts = np.sort(rng.integers(0, tokens + 1, (100, groups)), axis=1)
    routings = list(np.diff(cuts, axis=1, prepend=0).astype(np.int32))
    params, x, routings = jax.device_put((params, x, routings), ffi_device)
    program = jax.jit(step, donate_argnums=0).lower(params, x, routings[0]).compile()

    def run(steps):
        nonlocal params
        for i in range(steps):
            params = program(params, x, routings[i % len(routings)])
            if i % 100 == 0:
                jax.block_until_ready(params)
        jax.block_until_ready(params)

    steps = 36_000 if ffi_device.platform == "gpu" else 300
    run(steps // 10)
    before, wanted = resident_bytes(), state(ffi_device)
    run(steps)
    assert state(ffi_device) == wanted
    assert resident_bytes() - before < MOST_GROWTH
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def digest(program, operands):
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(program(operands)))).digest()


@contextlib.contextmanager
def other_work(device):
    """A thread keeps the device busy."""
    x = jax.device_put(jnp.ones((512, 512)), device)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    done = threading.Event()

    def work():
        while not done.is_set():
            jax.block_until_ready(product(x))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", EXAMPLES)
def test_determinism(ffi_device, name):
    """One set of bytes, however often: 1,000 runs on a GPU, beside other work."""
    if not EXAMPLES[name].is_native(ffi_device):
        pytest.skip("no kernel")
    call = Call(name, Shape((130, 0, 254), ((130, 0, 200),), 256, kinds=None))
    arrays = jax.device_put(call.arrays, ffi_device)
    program = jax.jit(lambda arrays: call.function(*arrays)).lower(arrays).compile()
    with other_work(ffi_device):
        assert len({digest(program, arrays) for _ in range(1000 if ffi_device.platform == "gpu" else 50)}) == 1


def test_threads(ffi_device):
    """8 threads, each with programs and data of its own, and all with one program."""
    shared = Problem(np.random.default_rng(9), ffi_device)

    def work(seed):
        rng = np.random.default_rng(seed)
        own = Problem(rng, ffi_device)
        for _ in range(20):
            own.check(rng)
            shared.check(rng)
            own.repeat(20)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))


# --- Processes --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def run_process(*arguments, **environment):
    process = subprocess.run(
        [sys.executable, "-m", "tests.processes.load", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.split()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method):
    """Worker processes that quantize, forked after the import or spawned; then the parent quantizes, too."""
    assert len(set(run_process(method))) == 1


def test_fork_after_use():
    """Forked when JAX and the operation have run, workers that stay away from JAX come home, and the parent goes on."""
    assert len(set(run_process("after"))) == 1


def test_any_number_of_threads():
    """XLA's pool may have any size: the same bytes."""
    results = [run_process("digest", NPROC=str(n), JAX_PLATFORMS="cpu") for n in (1, 3, 16)]
    assert len(set(map(tuple, results))) == 1 and results[0]
