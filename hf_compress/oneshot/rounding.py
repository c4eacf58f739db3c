"""Second-order rounding: weights -> levels of a grid, so that the layer's answers change least. Knows nothing about
models or containers.

Everything is in the coordinates of `Problem`, where diag G = 1: V_ij = W_ij ||x_j||. A level l of the grid stands for
l * step_ij there, step_ij = scale of the group * ||x_j||.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.grids import Grid
from hf_compress.oneshot.obs import COLUMNS
from hf_compress.oneshot.problem import Problem

UNKNOWNS = 1 << 26  # entries of the systems that `refit_scales` solves at once: 256 MB


def obs_round(
    values: Tensor, gram: Tensor, step: Tensor, grid: Grid, fixed: Tensor, *, act_order: bool = True
) -> tuple[Tensor, Tensor]:
    """GPTQ's loop (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): levels (out, in), and the sum of squared
    errors on the way, which equals tr(E G E^T), E the whole change: the layer's squared error.

    With U upper triangular, G^-1 = U^T U: rounding column j adds -(error_ij / U_jj) U_jk to every V_ik with k > j.

    Args:
        values: V (out, in) in fp32 or fp64, as gram (in, in), positive definite, and step (out, in).
        fixed: (out, in), the level a weight must take (0 where it was pruned), NaN where it is free.
        act_order: largest step first is not it: columns of large inputs first, while there is most left to make up
            for them. Scales do not move with the order.
    """
    size = step.abs().mean(0)  # ||x_j|| times what all columns share
    order = size.argsort(descending=True, stable=True) if act_order else torch.arange(len(size), device=size.device)
    values, step, pins = values.T[order], step.T[order], _columns(fixed[:, order])  # in one piece: twice as fast
    gram = gram[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    levels = torch.empty_like(values)
    loss = torch.zeros((), dtype=torch.float64, device=values.device)
    width = len(values)
    for begin in range(0, width, COLUMNS):
        end = min(begin + COLUMNS, width)
        block, factor = values[begin:end], upper[begin:end, begin:end]
        errors, pivots = torch.empty_like(block), factor.diagonal()
        for column in range(end - begin):
            here = begin + column
            levels[here] = _level(block[column] / step[here], grid, pins, here)
            error = torch.addcmul(block[column], levels[here], step[here], value=-1, out=errors[column])
            error.div_(pivots[column])
            block[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
        values[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
        loss += errors.double().square().sum()
    found = torch.empty_like(levels)
    found[order] = levels
    return found.T.contiguous(), loss


def coordinate_descent(given: Problem, levels: Tensor, step: Tensor, grid: Grid, fixed: Tensor) -> Tensor:
    """One pass over all columns in which each weight takes the level that is best with all others as they are:

        l_j <- nearest((q_j + (B - Q G)_j) / step_j),    G_jj = 1

    The loss never rises, so that passes end at a fixed point. QuantEase (Behdin et al. 2023,
    https://arxiv.org/abs/2309.01885). Shapes as `obs_round`.
    """
    pull = (given.right - (levels * step) @ given.gram).T.contiguous()
    levels, step, pins = levels.T.contiguous(), step.T.contiguous(), _columns(fixed)
    width = len(levels)
    for begin in range(0, width, COLUMNS):
        end = min(begin + COLUMNS, width)
        gram = given.gram[begin:end]
        block = pull[begin:end].clone()
        moved = torch.empty_like(block)
        for column in range(end - begin):
            here = begin + column
            new = _level(levels[here] + block[column] / step[here], grid, pins, here)
            change = torch.sub(new, levels[here], out=moved[column]).mul_(step[here])
            block[column + 1 :].addr_(gram[column, here + 1 : end], change, alpha=-1)
            levels[here] = new
        pull.addmm_(gram.T, moved, alpha=-1)
    return levels.T.contiguous()


def refit_scales(given: Problem, levels: Tensor, scale: Tensor) -> Tensor:
    """The scales (out, groups) that are best for these levels, all groups of a row together:

        A s = b,    A_gh = C_g G_gh C_h^T,    b_g = C_g B_g^T,    C = levels * ||x||

    a least-squares problem of as many unknowns as a row has groups. Groups whose levels are all 0 keep theirs. Rows
    are independent, and go `UNKNOWNS` entries of A at a time: those of a wide matrix would outweigh its block.
    """
    rows = max(1, UNKNOWNS // scale.shape[1] ** 2)
    parts = zip(given.right.split(rows), levels.split(rows), scale.split(rows), strict=True)
    return torch.cat([_refit(given, *part) for part in parts])


def _refit(given: Problem, right: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    groups = scale.shape[1]
    shape = (groups, -1)
    codes = levels * given.norm
    parts = codes.unflatten(1, shape)
    size = parts.shape[2]
    square = torch.stack(
        [
            ((parts[:, g] @ given.gram[g * size : (g + 1) * size]).unflatten(1, shape) * parts).sum(-1)
            for g in range(groups)
        ],
        1,
    )
    pull = (codes * right).unflatten(1, shape).sum(-1) - (square @ scale[..., None].float())[..., 0]
    ridge = 1e-6 * square.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
    square.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    change: Tensor = torch.linalg.solve(square, pull)
    return scale + change


def steps(given: Problem, scale: Tensor) -> Tensor:
    """Scales (out, groups) -> step (out, in)."""
    return scale.float().repeat_interleave(len(given.norm) // scale.shape[1], 1) * given.norm


def _columns(fixed: Tensor) -> Tensor | None:
    """(out, in) -> (in, out); None where every weight is free."""
    return None if fixed.isnan().all() else fixed.T.contiguous()


def _level(ratio: Tensor, grid: Grid, fixed: Tensor | None, column: int) -> Tensor:
    level = grid.nearest(ratio)
    return level if fixed is None else torch.where(fixed[column].isnan(), level, fixed[column])
