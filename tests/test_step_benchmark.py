"""The benchmark of a training step: which kind a kernel is of, and whose time a profile's events are."""

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not beside the tests")

from benchmarks import step
from benchmarks.lib.profile import Event

JVP, TRANSPOSE = "jit(_steps)/jvp(dispatch)", "jit(_steps)/transpose(jvp(dispatch))"


@pytest.mark.parametrize(
    ("kernel", "scope", "kind"),
    [
        ("void jax_tsq::sm90::matmul::(anonymous namespace)::MatmulKernel<true>(...)", "", "products"),
        ("void jax_tsq::cuda::(anonymous namespace)::RowsKernel<false>(...)", f"{JVP}/experts", "quantization"),
        ("void jax_tsq::cuda::(anonymous namespace)::DswigluKernel<1>(...)", "", "swiglu"),
        ("ncclDevKernel_AllGather_RING_LL(...)", JVP, "collectives"),
        ("mosaic_gpu_kernel", f"{TRANSPOSE}/experts/pallas_call", "products"),
        ("loop_multiply_fusion_3", f"{JVP}/experts/swiglu/mul", "swiglu"),
        ("loop_convert_fusion", f"{JVP}/experts/convert_element_type", "quantization"),
        ("loop_gather_fusion", f"{JVP}/gather", "dispatch"),
        ("nvjet_hsh_128x256", "jit(_steps)/transpose(jvp(attention))/dot_general", "attention"),
        ("loop_add_fusion", "jit(_steps)/optimizer/add", "optimizer"),
        ("loop_add_fusion", "", "rest"),
    ],
)
def test_kinds(kernel, scope, kind):
    """By a kernel's own name or by where its operation comes from."""
    assert step.kind(kernel, scope) == kind


def test_times_are_of_one_step():
    """Two steps of two kernels, one of which the program names."""
    hlo = """  ROOT %fusion.1 = f32[4]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(f)/optimizer/add" line=3}
  %dot.2 = f32[4]{0} custom-call(%a), custom_call_target="x", metadata={op_type="d" op_name="jit(f)/attention/dot"}"""

    class Compiled:
        def as_text(self):
            return hlo

    scopes = step.names(Compiled())
    assert scopes == {"fusion.1": "jit(f)/optimizer/add", "dot.2": "jit(f)/attention/dot"}
    events = [Event("gpu", "jit_f", 0, 4e6, "k", name) for name in ("fusion.1", "unknown") for _ in range(2)]
    kinds, operations = step.by_kind(events, scopes, 2)
    assert kinds == dict.fromkeys(step.KINDS, 0) | {"optimizer": 4.0, "rest": 4.0}
    assert operations[0] == ["optimizer", "k", "jit(f)/optimizer/add", 4.0]


def test_other_losses_are_seen():
    """Those of a mode that are far from those of bf16."""
    rows = {mode: {"losses": [5.0, 4.0]} for mode in step.MODES}
    assert step.compare({"modes": rows}) == []
    rows["fp8-mlp"] = {"losses": [5.0, 4.2]}
    assert len(step.compare({"modes": rows})) == 1
