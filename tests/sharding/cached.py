"""The persistent compilation cache; the directory is an argument, and whether the cache should hold the programs."""

import collections
import functools
import os
import sys

import jax
from jax.sharding import PartitionSpec as P

from tests import mesh
from tests.mesh import Call
from tests.operations import EXAMPLES, OF_EACH_KIND

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


def check_hit(call, function, arguments, expected=None, hits=True):
    """A right result, and a hit in the second process."""
    compiled, *counts = compile_counting(function, arguments)
    # In the first process a case before may have compiled the same program.
    assert counts in ([[1, 0]] if SECOND and hits else [[0, 1], [1, 0]] if hits else [[0, 1]]), counts
    assert mesh.custom_calls(compiled) == call.native_calls()  # a program from the cache shows them, too
    call.row.assert_same(compiled(*arguments), call.expected if expected is None else expected)


@CASES.add(operation=EXAMPLES)
def one_device(operation):
    call = Call(operation)
    check_hit(call, call.function, call.arrays)


@CASES.add(operation=EXAMPLES)
def explicit(operation):
    call = Call(operation)
    check_hit(call, call.function, call.put(mesh.make_mesh("explicit"), features="t"))


@CASES.add(kind=mesh.KINDS)
def shard_map(kind):
    m, call = mesh.make_mesh(kind), Call("split")
    function = jax.shard_map(call.function, mesh=m, in_specs=P(None, "t"), out_specs=call.specs(features="t"))
    check_hit(call, function, call.put(m, features="t"))


@CASES.add(kind=("auto", "mixed"))
def auto_without_the_flag(kind):
    """The address of a Python callback is in the key."""
    m, call = mesh.make_mesh(kind), Call("split")
    check_hit(call, call.function, call.put(m, features="t"), hits=m.size == 1)


@CASES.add(kind=("mixed",), operation=OF_EACH_KIND)
@CASES.add(kind=("auto",), operation=EXAMPLES)
def auto_with_the_flag(kind, operation):
    call = Call(operation)
    jax.config.update(FLAG, True)
    try:
        check_hit(call, call.function, call.put(mesh.make_mesh(kind), features="t"))
    finally:
        jax.config.update(FLAG, False)


@CASES.add(operation=("split", "ragged"))
def parameters_are_in_the_key(operation):
    """Programs that differ in nothing but a parameter do not pass for each other, in the same process or another."""
    call = Call(operation, counts=(256,), sizes=((100,),))
    arguments = call.put(mesh.make_mesh("auto"), features="t")
    flags = [False, True] if not SECOND else [True, False]
    every = [dict(pow_2_scales=flag) for flag in flags]
    if operation == "ragged":
        every = [dict(aligned=flag, **options) for options in every for flag in (False, True)]
    jax.config.update(FLAG, True)
    try:
        for options in every:
            check_hit(call, functools.partial(call.one, **options), arguments, call.expect(*call.arrays, **options))
    finally:
        jax.config.update(FLAG, False)


@CASES.add()
def the_path_is_in_the_key():
    """Nor does a weight gradient pass for one whose path another setting decides."""
    call = Call("wgrad", features=512)
    arguments = call.put(mesh.make_mesh("auto"), features="t")
    jax.config.update(FLAG, True)
    try:
        for setting, counts in (("portable", [0, 1]), ("auto", [0, 1]), ("portable", [1, 0])):
            os.environ["JAX_TSQ_KERNELS"] = setting
            _, *found = compile_counting(call.function, arguments)
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
