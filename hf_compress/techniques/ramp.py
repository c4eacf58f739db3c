"""Numbers that change over a run, by the share of its steps that are done: nothing to save for a resumed run."""

import math
from collections.abc import Callable

RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


def ramp(begin: float, end: float | None, shape: str, done: float) -> float:
    """From `begin` at done = 0 to `end` at done = 1 (None: it stays), evenly or slowly at both ends."""
    return begin if end is None else begin + (end - begin) * RAMPS[shape](done)
