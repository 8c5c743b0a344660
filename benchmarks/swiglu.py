"""swiglu_quantize with routing weights, beside a copy.

python -m benchmarks.swiglu --output benchmarks/results/swiglu-gpu.json
python -m benchmarks.report
"""

import functools
import sys

import jax_tsq
from benchmarks.lib import layer, quantizer


def run(group_sizes, gate_up, weights):
    values, scales = jax_tsq.swiglu_quantize(gate_up, group_sizes, weights)
    return values, scales.T  # as they lie in memory: nothing is copied


if __name__ == "__main__":
    shares = layer.Shares(random=0.97, aligned=0.97, quarter=0.93)
    cases = {
        "gpu": functools.partial(layer.on_gpu, "swiglu", run, shares, layer.swiglu_of, layer.EXPERTS),
        "cpu": functools.partial(layer.on_cpu, "swiglu", run, layer.swiglu_of),
    }
    sys.exit(quantizer.main("swiglu", cases))
