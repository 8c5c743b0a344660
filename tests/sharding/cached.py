"""The persistent compilation cache; the directory is an argument, and whether the cache should hold the programs."""

import collections
import os
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import mesh
from tests.cases import float8_e4m3fn
from tests.mesh import Call, put

CASES = mesh.Cases()
EVENTS = collections.Counter()
FLAG = "jax_remove_custom_partitioning_ptr_from_cache_key"
DIRECTORY, SECOND = (sys.argv[1], sys.argv[2] == "second") if len(sys.argv) == 3 else (None, False)


def compile_counting(function, arguments):
    """The compiled program, and how often the cache had it and had it not."""
    jax.clear_caches()
    EVENTS.clear()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, EVENTS["/jax/compilation_cache/cache_hits"], EVENTS["/jax/compilation_cache/cache_misses"]


def check_hit(function, arguments, expected, hits=True):
    """Right bytes, and a hit in the second process."""
    compiled, *counts = compile_counting(function, arguments)
    # In the first process a case before may have compiled the same program.
    assert counts in ([[1, 0]] if SECOND and hits else [[0, 1], [1, 0]] if hits else [[0, 1]]), counts
    assert mesh.custom_calls(compiled) == 1  # a program from the cache shows them, too
    mesh.assert_same_bytes(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(expected))


@CASES.add(operation=mesh.OPERATIONS)
def one_device(operation):
    call = Call(operation)
    check_hit(call.function, call.arrays, call.expected)


@CASES.add(operation=mesh.OPERATIONS)
def explicit(operation):
    call = Call(operation)
    check_hit(call.function, call.put(mesh.make_mesh("explicit"), features="t"), call.expected)


@CASES.add(kind=mesh.KINDS)
def shard_map(kind):
    m, call = mesh.make_mesh(kind), Call("split")
    function = jax.shard_map(call.function, mesh=m, in_specs=P(None, "t"), out_specs=call.specs(features="t"))
    check_hit(function, call.put(m, features="t"), call.expected)


@CASES.add(kind=("auto", "mixed"))
def auto_without_the_flag(kind):
    """The address of a Python callback is in the key."""
    m, call = mesh.make_mesh(kind), Call("split")
    check_hit(call.function, call.put(m, features="t"), call.expected, hits=m.size == 1)


@CASES.add(kind=("auto", "mixed"), operation=mesh.OPERATIONS)
def auto_with_the_flag(kind, operation):
    call = Call(operation)
    jax.config.update(FLAG, True)
    try:
        check_hit(call.function, call.put(mesh.make_mesh(kind), features="t"), call.expected)
    finally:
        jax.config.update(FLAG, False)


@CASES.add(operation=("split", "ragged"))
def parameters_are_in_the_key(operation):
    """Programs that differ in nothing but a parameter do not pass for each other, in the same process or another."""
    m = mesh.make_mesh("auto")
    x, sizes = mesh.data(tokens=256)[0], mesh.SIZES[:1]
    jax.config.update(FLAG, True)
    try:
        for pow_2_scales in (False, True) if not SECOND else (True, False):
            if operation == "split":

                def function(x, pow_2_scales=pow_2_scales):
                    return jax_tsq.fused_transpose_split_quant(x, None, (256,), pow_2_scales)

                expected = mesh.spec.split(x, None, (256,), pow_2_scales)
                check_hit(function, [put(x, m, None, "t")], expected)
            else:
                for aligned in (False, True):

                    def function(x, sizes, aligned=aligned, pow_2_scales=pow_2_scales):
                        options = dict(aligned=aligned, pow_2_scales=pow_2_scales)
                        return jax_tsq.ragged_transpose_quant(x, sizes, **options)

                    expected = mesh.spec.ragged(x, sizes, None, pow_2_scales, aligned)
                    check_hit(function, [put(x, m, None, "t"), put(sizes, m)], expected)
    finally:
        jax.config.update(FLAG, False)


@CASES.add()
def the_path_is_in_the_key():
    """Nor does a weight gradient pass for one whose path another setting decides."""
    m, dtype = mesh.make_mesh("auto"), np.float32
    operand = jax_tsq.RaggedQuantized(np.zeros((512, 256), float8_e4m3fn), np.ones((2, 512), dtype), np.int32([256]))
    arguments = [jax.tree.map(lambda a, s: put(a, m, *s), operand, mesh.ragged_specs((), f)) for f in ("t", None)]
    jax.config.update(FLAG, True)
    try:
        for setting, counts in (("portable", [0, 1]), ("auto", [0, 1]), ("portable", [1, 0])):
            os.environ["JAX_TSQ_KERNELS"] = setting
            _, *found = compile_counting(jax_tsq.ragged_weight_gradient, arguments)
            assert found == ([1, 0] if SECOND else counts), (setting, found)
    finally:
        jax.config.update(FLAG, False)
        del os.environ["JAX_TSQ_KERNELS"]


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", DIRECTORY)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.monitoring.register_event_listener(lambda event, **_: EVENTS.update([event]))
    del sys.argv[1:]
    CASES.main()
