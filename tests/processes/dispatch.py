"""The benchmark's dispatch on 4 host devices: by an exchange that XLA:CPU lacks, and by one that is wrong."""

import jax

from benchmarks.multi_gpu import dispatch
from tests import mesh

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    exchange = mesh.load("training").ragged_all_to_all
    jax.lax.ragged_all_to_all = exchange
    result = dispatch.compare(dispatch.SMALL)
    for row in result["rows"]:
        assert row["rows_in_use"] + row["rows_of_nan"] == 4 * dispatch.SMALL.tokens, row
    assert len(result["rows"]) == 4 and not result["failures"], result
    jax.lax.ragged_all_to_all = lambda *operands, **options: -exchange(*operands, **options)
    assert len(dispatch.compare(dispatch.SMALL)["failures"]) == 4
