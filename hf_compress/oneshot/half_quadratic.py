"""Half-quadratic rounding: scales (and zeros) that few large errors do not drag along, from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.grids import Grid


@dataclass
class Half:
    """The state of one matrix in units of its first scales: all tensors (out, groups, group), but factor and zero
    (out, groups, 1).

    goal: x, the weights. error: e, what of x is left to the error. level: q. The values are factor * (level - zero).
    """

    goal: Tensor
    error: Tensor
    level: Tensor
    factor: Tensor
    zero: Tensor

    @staticmethod
    def start(matrix: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Half:
        """At the nearest levels."""
        goal = grid.groups(matrix).float() / scale[..., None].float()
        offset = torch.zeros_like(scale[..., None]).float() if zero is None else zero[..., None].float()
        made = Half(goal, torch.zeros_like(goal), torch.zeros_like(goal), torch.ones_like(offset), offset)
        made.round(grid, whole=True)
        return made

    @property
    def residual(self) -> Tensor:
        """x - factor (q - zero)."""
        return self.goal - self.factor * (self.level - self.zero)

    def loss(self, p: float) -> Tensor:
        """sum |x - factor (q - zero)|^p of each group, (out, groups)."""
        return self.residual.abs().pow(p).sum(-1)

    def objective(self, p: float, beta: float) -> Tensor:
        """sum |e|^p + beta / 2 (e - residual)^2 of each group, (out, groups): each method below lowers it."""
        return (self.error.abs().pow(p) + beta / 2 * (self.error - self.residual).square()).sum(-1)

    def shrink(self, p: float, beta: float) -> None:
        """e <- the better of 0, of the minimiser that is not 0, found as the fixed point of e = r - p e^(p-1) / beta,
        and of e as it was."""
        residual = self.residual
        size = residual.abs()
        tried = size
        for _ in range(3):
            tried = (size - p / beta * tried.clamp_min(1e-6).pow(p - 1)).clamp_min(0)
        best, least = self.error, self.error.abs().pow(p) + beta / 2 * (self.error - residual).square()
        for each in (torch.zeros_like(residual), residual.sign() * tried):
            cost = each.abs().pow(p) + beta / 2 * (each - residual).square()
            best, least = torch.where(cost < least, each, best), torch.minimum(cost, least)
        self.error = best

    def round(self, grid: Grid, *, whole: bool = False) -> None:
        """q <- nearest((x - e) / factor + zero); `whole`: of x itself, which is best for `loss`."""
        left = self.goal if whole else self.goal - self.error
        self.level = grid.nearest(left / self.factor + self.zero)

    def fit_factor(self) -> None:
        """factor <- the least squares of x - e on q - zero; groups all at 0 keep theirs."""
        at = self.level - self.zero
        square = at.square().sum(-1, keepdim=True)
        found = (at * (self.goal - self.error)).sum(-1, keepdim=True) / square.clamp_min(1e-12)
        self.factor = torch.where((square > 0) & (found > 0), found, self.factor)

    def fit_zero(self, grid: Grid) -> None:
        """zero <- the level nearest to the mean of q - (x - e) / factor, so that 0 stays a point."""
        mean = (self.level - (self.goal - self.error) / self.factor).mean(-1, keepdim=True)
        self.zero = mean.round().clamp(0, grid.levels()[-1])


def in_scales(beta: float, p: float, grid: Grid) -> float:
    """beta for errors in mean steps of the grid -> for errors in scales, where |e|^p and e^2 weigh the same."""
    levels = grid.levels()
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    return float(beta / step ** (2 - p))


def half_quadratic(
    matrix: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, *, p: float, beta: float, steps: int
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros (out, groups) with a lower sum |w - point|^p than those given, in each group, or the same.

    Alternates the steps of `Half`, beta (for errors in mean steps of the grid) growing by 1% each time. HQQ (Badri
    and Shaji 2023, https://mobiusml.github.io/hqq_blog/) moves zero alone, which need not be a level there; grids
    around 0 have only the scale to move.
    """
    state = Half.start(matrix, scale, zero, grid)
    first, beta = state.loss(p), in_scales(beta, p, grid)
    for _ in range(steps):
        state.shrink(p, beta)
        state.round(grid)
        state.fit_factor()
        if zero is not None:
            state.fit_zero(grid)
        beta *= 1.01
    state.round(grid, whole=True)
    better = state.loss(p) < first
    found = torch.where(better, scale.float() * state.factor[..., 0], scale.float()).to(scale.dtype)
    return found, None if zero is None else torch.where(better, state.zero[..., 0], zero)
