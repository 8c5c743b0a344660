"""How many tokens each expert gets."""

import numpy as np

BLOCK = 128


def jagged(tokens: int, experts: int, multiple: int = BLOCK) -> list[int]:
    """Uneven token counts that are multiples of `multiple`."""
    share = np.random.default_rng(tokens + experts).dirichlet(np.full(experts, 4.0))
    ends = np.round(np.cumsum(share) * (tokens // multiple)).astype(int) * multiple
    ends[-1] = tokens
    return np.diff(ends, prepend=0).tolist()
