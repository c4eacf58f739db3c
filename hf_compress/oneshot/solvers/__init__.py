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
class Solver:
    """What the one-shot engine applies to every matrix.

    solve: (weight, statistics) -> its new values (out, in); `weight.matrix` holds the old. needs: the `Statistics`
    fields it reads; none of them, and the blocks are not run at all. options: JSON facts that tell two solvers apart,
    so that finished blocks of another run are not taken for this one's.
    """

    solve: Callable[[Weight, Statistics], Tensor]
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


solvers: Registry[Callable[..., Solver]] = Registry("solver", __name__)
"""``solver(**options) -> Solver``. Trait `makes`: ``zeros`` (a `prune` stage) or ``codes`` (a `quantize` stage, with
options bits and group_size)."""
