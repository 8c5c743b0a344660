"""What test_load runs in processes of their own. Every line printed is a digest of the same results."""

import hashlib
import multiprocessing
import sys
import warnings

import jax
import numpy as np

import jax_tsq
from tests.cases import bfloat16, matrix

COUNTS = [130, 0, 257, 1000]


def digest(_=None):
    """Of results large enough for all threads."""
    x, _ = matrix(5, bfloat16, COUNTS, 515)
    split = jax.jit(lambda x: jax_tsq.fused_transpose_split_quant(x, None, COUNTS))(x)
    ragged = jax.jit(jax_tsq.ragged_transpose_quant)(x, np.int32(COUNTS))
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves((split, ragged)))).hexdigest()


def without_jax(seed):
    """What a data loader does."""
    return float(np.random.default_rng(seed).standard_normal(10000).sum())


def main(what):
    if what in ("fork", "spawn"):
        with multiprocessing.get_context(what).Pool(2) as pool:
            for result in pool.map(digest, range(4)):
                print(result)
    print(digest())
    if what == "after":
        # JAX warns of what is tested here.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(without_jax, range(50)) == [without_jax(seed) for seed in range(50)]
        print(digest())


if __name__ == "__main__":
    main(sys.argv[1])
