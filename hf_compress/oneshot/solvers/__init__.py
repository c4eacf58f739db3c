"""Solvers: how one matrix is compressed, given what calibration saw of it. Independent of models and containers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_compress.criteria import Statistics
from hf_compress.registry import Registry
from hf_compress.weights import Weight


@dataclass(frozen=True)
class Solved:
    """New values of a matrix, (out, in). scale: (out, groups), the grid they lie on, when the solver chose one: a
    container then stores exactly these codes instead of finding a scale of its own."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Solver:
    """What the one-shot engine applies to every matrix.

    solve: (weight, statistics) -> its new values; `weight.matrix` holds the old. needs: the `Statistics` fields it
    reads; none of them, and the blocks are not run at all. options: JSON facts that tell two solvers apart,
    so that finished blocks of another run are not taken for this one's.
    """

    solve: Callable[[Weight, Statistics], Solved]
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


solvers: Registry[Callable[..., Solver]] = Registry("solver", __name__)
"""``solver(**options) -> Solver``. Trait `makes`: ``zeros`` (a `prune` stage) or ``codes`` (a `quantize` stage, with
options bits and group_size)."""
