"""Which weights to keep, found together with their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.oneshot.problem import Problem
from hf_compress.precision import rough

RHO = 0.1  # the first penalty, in units of diag G
GROWTH = 2.0  # of the penalty, each time it grows
HOLD = 3  # iterations between: each new penalty costs a factorisation


def admm(given: Problem, start: Tensor, choose: Callable[[Tensor], Tensor], *, iterations: int) -> Tensor:
    """Values (out, in) with the sparsity that `choose` (scores -> mask) allows, near the best of that kind.

    Splits V (dense, minimises) from D (sparse, projected): with the penalty rho and the dual U,

        V = (B - U + rho D)(G + rho I)^-1        D = V + U / rho where |V + U / rho| is chosen, else 0
        U = U + rho (V - D)

    rho grows, so V and D meet: early iterations let weights come back, late ones only move values. The first half
    of ALPS (Meng et al. 2024, https://arxiv.org/abs/2406.07831), whose penalty grows every iteration; here it is
    held for `HOLD` of them, which share its inverse. Products with it may be rounded (`rough`): what is wanted is the
    mask, and the values on it come after.
    """
    sparse, dual, rho = start * choose(start.abs()), torch.zeros_like(start), RHO
    for iteration in range(iterations):
        if iteration % HOLD == 0:
            rho *= GROWTH if iteration else 1.0
            inverse = rough(_shifted_inverse(given.gram, rho))
        values = (rough(torch.sub(given.right, dual).add_(sparse, alpha=rho)) @ inverse).to(start.dtype)
        candidate = torch.add(values, dual, alpha=1 / rho)
        sparse = candidate.mul_(choose(candidate.abs()))
        dual.add_(values.sub_(sparse), alpha=rho)
    return sparse


def _shifted_inverse(gram: Tensor, shift: float) -> Tensor:
    moved = gram.clone()
    moved.diagonal().add_(shift)
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(moved))
    return inverse
