"""The persistent compilation cache; the directory is an argument, and whether the cache should hold the programs."""

import collections
import sys

import jax
import mesh
from jax.sharding import PartitionSpec as P
from mesh import Call, put

import jax_tsq

CASES = mesh.Cases()
EVENTS = collections.Counter()
FLAG = "jax_remove_custom_partitioning_ptr_from_cache_key"
DIRECTORY, SECOND = (sys.argv[1], sys.argv[2] == "second") if len(sys.argv) == 3 else (None, False)


def check_hit(function, arguments, expected, hits=True):
    """Right bytes, and a hit in the second process."""
    jax.clear_caches()
    EVENTS.clear()
    compiled = jax.jit(function).lower(*arguments).compile()
    counts = EVENTS["/jax/compilation_cache/cache_hits"], EVENTS["/jax/compilation_cache/cache_misses"]
    # In the first process a case before may have compiled the same program.
    assert counts in ([(1, 0)] if SECOND and hits else [(0, 1), (1, 0)] if hits else [(0, 1)]), counts
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


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", DIRECTORY)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.monitoring.register_event_listener(lambda event, **_: EVENTS.update([event]))
    del sys.argv[1:]
    CASES.main()
