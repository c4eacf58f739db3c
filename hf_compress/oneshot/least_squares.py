"""The best weights on a mask that is given: all rows at once by conjugate gradients, and one by one as a check."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.oneshot.problem import Problem


def conjugate_gradients(given: Problem, mask: Tensor, start: Tensor, *, steps: int) -> Tensor:
    """The minimiser of `given` on a mask (out, in); `start` is zero outside it.

    Every row is a problem of its own, with G restricted to the row's support: no factorisation is shared, but products
    with G are, and conjugate gradients need nothing else. G has a unit diagonal, so this is already the
    Jacobi-preconditioned form. The loss never rises; the limit is that of `direct`. The second half of ALPS (Meng et
    al. 2024, https://arxiv.org/abs/2406.07831).
    """
    values = start.clone()
    residual = (given.right - values @ given.gram) * mask
    direction, square = residual.clone(), residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ given.gram
        step = square / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        values.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1).mul_(mask)
        before, square = square, residual.square().sum(1, keepdim=True)
        direction.mul_(square / before.clamp_min(1e-30)).add_(residual)
    return values


def direct(given: Problem, mask: Tensor) -> Tensor:
    """The same row by row, w_S = G_SS^-1 b_S by Cholesky: the oracle of the tests, far slower."""
    values = torch.zeros_like(given.right)
    for row, kept in enumerate(mask):
        if kept.any():
            factor = torch.linalg.cholesky(given.gram[kept][:, kept])
            values[row, kept] = torch.cholesky_solve(given.right[row, kept, None], factor)[:, 0]
    return values
