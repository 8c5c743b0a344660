"""quantize_rows with group sizes, beside a copy.

python -m benchmarks.rows --output benchmarks/results/rows-gpu.json
python -m benchmarks.report
"""

import functools
import sys

import jax_tsq
from benchmarks.lib import layer, quantizer


def run(group_sizes, x):
    values, scales = jax_tsq.quantize_rows(x, group_sizes)
    return values, scales.T  # as they lie in memory: nothing is copied


if __name__ == "__main__":
    cases = {
        "gpu": functools.partial(layer.on_gpu, "rows", run, layer.Shares(0.94, 0.94)),
        "cpu": functools.partial(layer.on_cpu, "rows", run),
    }
    sys.exit(quantizer.main("rows", cases))
