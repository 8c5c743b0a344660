"""swiglu_backward_quantize with routing weights, beside a copy.

python -m benchmarks.dswiglu --output benchmarks/results/dswiglu-gpu.json
python -m benchmarks.report
"""

import functools
import sys

import jax_tsq
from benchmarks.lib import layer, quantizer


def run(group_sizes, gate_up, weights, dh):
    rows, do1, h, dweights = jax_tsq.swiglu_backward_quantize(gate_up, dh, group_sizes, weights)
    # Scales of rows as they lie in memory, and the padded sizes once: nothing is copied.
    return rows.values, rows.scales.T, *do1, h.values, h.scales, dweights


if __name__ == "__main__":
    shares = layer.Shares(random=0.91, aligned=0.91, quarter=0.90)
    cases = {
        "gpu": functools.partial(layer.on_gpu, "dswiglu", run, shares, layer.dswiglu_of, layer.EXPERTS),
        "cpu": functools.partial(layer.on_cpu, "dswiglu", run, layer.dswiglu_of),
    }
    sys.exit(quantizer.main("dswiglu", cases))
