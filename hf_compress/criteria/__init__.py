"""Importance criteria: pure functions from one weight matrix and its statistics to one score per weight. Higher =
keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_compress.registry import Registry


@dataclass
class Statistics:
    """What calibration saw of one weight matrix (out, in). A field is None unless a criterion's `needs` names it.

    input_norm: (in,) fp32, sqrt(sum over tokens of g^2 x_j^2), g the router weight of an expert's token (1 elsewhere).
    hessian: (in, in) fp32, sum over tokens of g^2 x x^T.
    gradient: (out, in), mean gradient of the task loss.
    tokens: how many tokens reached this weight.
    """

    tokens: int = 0
    input_norm: Tensor | None = None
    hessian: Tensor | None = None
    gradient: Tensor | None = None


Criterion = Callable[[Tensor, Statistics], Tensor]
"""``criterion(weight (out, in), statistics) -> (out, in)`` in fp32. Trait `needs`: the Statistics fields it reads."""

criteria: Registry[Criterion] = Registry("criterion", __name__)
