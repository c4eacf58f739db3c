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
    values, step, fixed = values[:, order], step[:, order], fixed[:, order]
    gram = gram[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    levels = torch.zeros_like(values)
    loss = torch.zeros((), dtype=torch.float64, device=values.device)
    width = values.shape[1]
    for begin in range(0, width, COLUMNS):
        end = min(begin + COLUMNS, width)
        block, factor = values[:, begin:end], upper[begin:end, begin:end]
        errors = torch.zeros_like(block)
        for column in range(end - begin):
            here = begin + column
            level = _level(block[:, column] / step[:, here], grid, fixed[:, here])
            error = (block[:, column] - level * step[:, here]) / factor[column, column]
            block[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
            errors[:, column], levels[:, here] = error, level
        values[:, end:] -= errors @ upper[begin:end, end:]
        loss += errors.double().square().sum()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return levels[:, back], loss


def coordinate_descent(given: Problem, levels: Tensor, step: Tensor, grid: Grid, fixed: Tensor) -> Tensor:
    """One pass over all columns in which each weight takes the level that is best with all others as they are:

        l_j <- nearest((q_j + (B - Q G)_j) / step_j),    G_jj = 1

    The loss never rises, so that passes end at a fixed point. QuantEase (Behdin et al. 2023,
    https://arxiv.org/abs/2309.01885). Shapes as `obs_round`.
    """
    levels = levels.clone()
    pull = given.right - (levels * step) @ given.gram
    width = levels.shape[1]
    for begin in range(0, width, COLUMNS):
        end = min(begin + COLUMNS, width)
        gram = given.gram[begin:end]
        block, moved = pull[:, begin:end].clone(), torch.zeros_like(pull[:, begin:end])
        for column in range(end - begin):
            here = begin + column
            old, size = levels[:, here], step[:, here]
            new = _level(old + block[:, column] / size, grid, fixed[:, here])
            change = (new - old) * size
            block -= change[:, None] * gram[column, begin:end]
            moved[:, column], levels[:, here] = change, new
        pull -= moved @ gram
    return levels


def refit_scales(given: Problem, levels: Tensor, scale: Tensor) -> Tensor:
    """The scales (out, groups) that are best for these levels, all groups of a row together:

        A s = b,    A_gh = C_g G_gh C_h^T,    b_g = C_g B_g^T,    C = levels * ||x||

    a least-squares problem of as many unknowns as a row has groups. Groups whose levels are all 0 keep theirs.
    """
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
    pull = (codes * given.right).unflatten(1, shape).sum(-1) - (square @ scale[..., None].float())[..., 0]
    ridge = 1e-6 * square.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
    square.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    change: Tensor = torch.linalg.solve(square, pull)
    return scale + change


def steps(given: Problem, scale: Tensor) -> Tensor:
    """Scales (out, groups) -> step (out, in)."""
    return scale.float().repeat_interleave(len(given.norm) // scale.shape[1], 1) * given.norm


def _level(ratio: Tensor, grid: Grid, fixed: Tensor) -> Tensor:
    return torch.where(fixed.isnan(), grid.nearest(ratio), fixed)
