"""Functions that have no derivative, and say so when they are differentiated."""

from collections.abc import Callable

import jax


def refuse(message: str, function: Callable) -> Callable:
    """Returns a function that raises NotImplementedError where it is differentiated, and is the same elsewhere."""
    refusing = jax.custom_jvp(function)

    @refusing.defjvp
    def _(primals, tangents):
        raise NotImplementedError(message)

    return refusing
