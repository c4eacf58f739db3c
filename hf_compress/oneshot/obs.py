"""Optimal brain surgery column by column: zero a weight, let the ones to its right make up for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 128  # columns between two updates of everything to their right


def obs_prune(
    matrix: Tensor, gram: Tensor, choose: Callable[[Tensor, int], Tensor], *, every: int
) -> tuple[Tensor, Tensor]:
    """SparseGPT's loop (Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774): new values (out, in), and the
    sum of the squared errors on the way, which equals tr(E G E^T), E the whole change: the layer's squared error.

    With U upper triangular, G^-1 = U^T U: a weight of column j costs W_ij^2 / U_jj^2; zeroing it adds
    -(W_ij / U_jj) U_j,k to every W_ik with k > j.

    Args:
        matrix: (out, in) in fp32 or fp64, as gram: (in, in), positive definite.
        choose: (scores (out, n), first column) -> mask, asked every `every` columns (`COLUMNS`, or M for N:M), with
            the weights as they are by then.
    """
    values = matrix.T.contiguous()  # a column lies in one piece: the loop is twice as fast
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    loss = torch.zeros((), dtype=torch.float64, device=matrix.device)
    width = len(values)
    for begin in range(0, width, COLUMNS):
        end = min(begin + COLUMNS, width)
        block, factor = values[begin:end], upper[begin:end, begin:end]
        errors, pivots = torch.empty_like(block), factor.diagonal()
        for column in range(end - begin):
            if column % every == 0:
                here = slice(column, min(column + every, end - begin))
                scores = (block[here] / pivots[here, None]).square()
                dropped = ~choose(scores.T, begin + column).T
            gone = dropped[column % every]
            error = torch.mul(block[column], gone, out=errors[column]).div_(pivots[column])
            block[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
            block[column].masked_fill_(gone, 0)
        values[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
        loss += errors.double().square().sum()
    return values.T.contiguous(), loss
