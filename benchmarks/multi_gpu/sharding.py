"""Bytes on a mesh of all devices: cases of `tests/sharding/`, each of which allows no communication."""

import traceback

import jax

from tests import mesh

# How the names of the cases that run start, by program.
CASES = {
    "propagated": [
        f"stays_split-{kind}-{operation}{layout}"
        for kind in ("auto", "explicit")
        for operation in ("split-", "ragged_fp8-")
        for layout in ("features_over_two_axes", "experts_over_two_axes", "experts_and_features")
    ],
    "shard_maps": [
        f"{case}-{kind}"
        for case in ("different_groups_on_each_device", "different_tokens_on_each_device")
        for kind in ("auto", "explicit")
    ],
}
FEW = {"propagated": CASES["propagated"][:3], "shard_maps": ["different_tokens_on_each_device-auto"]}


def run(small: bool) -> dict:
    failures, cases = [], 0
    for program, starts in (FEW if small else CASES).items():
        for name, case in mesh.load(program).CASES.functions.items():
            if name.startswith(tuple(starts)):
                cases += 1
                try:
                    case()
                except Exception:
                    failures.append(f"process {jax.process_index()}, {program}/{name}: {traceback.format_exc()}")
    return {"failures": failures, "rows": [], "cases": cases, "mesh": dict(mesh.make_mesh("auto").shape)}
