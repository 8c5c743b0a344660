"""ragged_quantize beside a copy.

python -m benchmarks.dual --output benchmarks/results/dual-gpu.json
python -m benchmarks.report
"""

import functools
import sys

import jax_tsq
from benchmarks.lib import layer, quantizer


def run(group_sizes, x):
    rows, columns = jax_tsq.ragged_quantize(x, group_sizes)
    return rows.values, rows.scales.T, *columns  # scales of rows as they lie in memory: nothing is copied


if __name__ == "__main__":
    cases = {
        "gpu": functools.partial(layer.on_gpu, "dual", run, layer.Shares(0.94, 0.95)),
        "cpu": functools.partial(layer.on_cpu, "dual", run),
    }
    sys.exit(quantizer.main("dual", cases))
