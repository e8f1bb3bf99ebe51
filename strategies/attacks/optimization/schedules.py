"""How an optimizer's rate changes: factors of the share of iterations done, in ``[0, 1)``."""

from collections.abc import Callable
from math import cos, pi


def constant(progress: float) -> float:  # noqa: ARG001
    """Return 1."""
    return 1.0


def ig_steps(progress: float) -> float:
    """Return the factor 0.1 at 3/8, 5/8 and 7/8 of the iterations each (Geiping et al. 2020)."""
    return 0.1 ** sum(progress >= mark for mark in (3 / 8, 5 / 8, 7 / 8))


def cosine(warm_up: float = 0.0, lowest: float = 0.0) -> Callable[[float], float]:
    """Return a rise over the share ``warm_up``, then half a cosine down to ``lowest``."""

    def factor(progress: float) -> float:
        if progress < warm_up:
            return progress / warm_up
        fallen = (progress - warm_up) / (1 - warm_up)
        return lowest + (1 - lowest) * (1 + cos(pi * fallen)) / 2

    return factor


def exponential(last: float) -> Callable[[float], float]:
    """Return an exponential fall from 1 to ``last``."""
    return lambda progress: last**progress
