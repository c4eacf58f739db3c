"""Importance criteria: pure functions from one weight matrix and its statistics to one score per weight. Higher =
keep."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.registry import Registry


@dataclass
class Statistics:
    """What calibration or training saw of one weight matrix (out, in). A field is None unless a criterion's `needs`
    names it.

    tokens: how many tokens reached this weight.
    input_norm: (in,) fp32, sqrt(sum over tokens of g^2 x_j^2), g the router weight of an expert's token (1 elsewhere).
    input_max: (in,) fp32, the largest |g x_j|.
    hessian: (in, in) fp32, sum over tokens of g^2 x x^T.
    drift: (in, in) fp32, sum over tokens of g^2 (d - x) x^T, d what the dense model reads where this one reads x.
    residual: (out, in) fp32, sum over tokens of (dense - compressed residual stream) x^T, of weights that write to it.
    folds: the same sums over each half of the calibration text, to choose a solver's settings on text it did not see.
    gradient: (out, in) fp32, mean gradient of the loss over batches (steps, in training).
    fisher: (out, in) fp32, mean over the same of the squared gradient, the diagonal of the empirical Fisher matrix.
    movement: (out, in) fp32, sum over training steps of -gradient * weight.
    seed: of the random control: see `seed_of`.
    """

    tokens: int = 0
    input_norm: Tensor | None = None
    input_max: Tensor | None = None
    hessian: Tensor | None = None
    drift: Tensor | None = None
    residual: Tensor | None = None
    folds: tuple[Statistics, ...] = ()
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    movement: Tensor | None = None
    seed: int = 0

    def let_go(self) -> None:
        """Drop what is as large as a matrix: a solver that has made its problem of it needs it no more, and it would
        be most of what is in memory while that is solved."""
        self.hessian = self.drift = self.residual = None
        for half in self.folds:
            half.let_go()


Criterion = Callable[[Tensor, Statistics], Tensor]
"""``criterion(weight (out, in), statistics) -> (out, in)`` in fp32. Trait `needs`: the Statistics fields it reads."""

criteria: Registry[Criterion] = Registry("criterion", __name__)

ONESHOT = frozenset({"input_norm", "input_max", "hessian", "gradient", "fisher"})
"""What calibration can collect."""
TRAINING = frozenset({"input_norm", "gradient", "fisher", "movement"})
"""What a training run can collect."""


def seed_of(name: str, seed: int = 0) -> int:
    """The seed of a weight: other names give other numbers, the same name the same one in every process."""
    return zlib.crc32(f"{seed} {name}".encode())


def usable(criterion: str, collected: Collection[str], *, during: str, where: str) -> None:
    """Raise a `CompressError` unless everything that `criterion` needs is in `collected` (`ONESHOT` or `TRAINING`).

    during: ``one-shot pruning`` or ``training``, for the message.
    """
    lacking = set(criteria.entry(criterion, where=where).traits["needs"]) - set(collected)
    if lacking:
        known = [entry.name for entry in criteria if set(entry.traits["needs"]) <= set(collected)]
        raise CompressError(
            f"{criterion!r} needs the {' and '.join(sorted(lacking))}, which {during} does not collect",
            where=where,
            next_step="use one of " + ", ".join(known),
        )
