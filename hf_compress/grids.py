"""Points that a weight may take: a few levels times a scale that neighbours share. Knows nothing about models or
containers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import CompressError

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, 0 exact (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""
_FP4 = (1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
FP4 = (*(-magnitude for magnitude in reversed(_FP4)), 0.0, *_FP4)
"""bitsandbytes' 4-bit float: one sign, two exponent and one mantissa bit, over its largest value."""
KINDS = ("int", "uint", "nf4", "fp4", "powers", "codebook")


@dataclass(frozen=True)
class Grid:
    """Points scale * (level - zero).

    bits: 2^bits levels. group_size: inputs of a row that share a scale (None: the whole row; for one scale of a whole
    tensor give it as one row).
    kind: ``int``, integers -2^(b-1) .. 2^(b-1) - 1; ``uint``, 0 .. 2^b - 1 less a zero point of each group; ``nf4``,
    ``fp4``; ``powers``, 0 and +-2^-k, k = 0 .. 2^(b-1) - 2; ``codebook``, the levels of `table` (`k_means`). 0 is
    always a point.
    pinned: the container finds the scale again as max |value| of a group, so in each group some weight must stand at
    the largest magnitude, and no lower level than that exists. settle: scales (out, groups) -> what it makes of them.
    """

    bits: int
    group_size: int | None = None
    kind: str = "int"
    table: tuple[float, ...] = ()
    pinned: bool = False
    settle: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    @property
    def largest(self) -> float:
        """The magnitude that levels reach on both sides; of a codebook, on either."""
        if self.kind == "int":
            return float((1 << (self.bits - 1)) - 1)
        levels = self.levels()
        if self.kind == "codebook":
            return max(-levels[0], levels[-1]) or 1.0  # a matrix of zeros has no other level
        return min(-levels[0], levels[-1])

    def levels(self) -> tuple[float, ...]:
        """Ascending."""
        return _levels(self.bits, self.kind, self.table, self.pinned)

    def nearest(self, ratio: Tensor) -> Tensor:
        """The level nearest to each ratio w / scale + zero, fp32; halves go to the even integer."""
        levels = self.levels()
        if self.kind in ("int", "uint"):
            return ratio.round().clamp(levels[0], levels[-1])
        table = torch.tensor(levels, device=ratio.device)
        return table[torch.bucketize(ratio.contiguous(), (table[1:] + table[:-1]) / 2)]

    def stored(self, scale: Tensor) -> Tensor:
        """The scales that a reader of the container will see."""
        return scale if self.settle is None else self.settle(scale)

    def groups(self, matrix: Tensor) -> Tensor:
        """(out, in) -> (out, groups, group) view.

        Raises:
            CompressError: the group size does not divide the inputs.
        """
        size = self.group_size or matrix.shape[1]
        if matrix.shape[1] % size:
            raise CompressError(
                f"group size {size} does not divide {matrix.shape[1]} inputs",
                where="quantization grid",
                next_step="pick a divisor of the inputs, or no group size",
            )
        grouped: Tensor = matrix.unflatten(1, (-1, size))
        return grouped

    def facts(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "kind": self.kind}


@cache
def _levels(bits: int, kind: str, table: tuple[float, ...], pinned: bool) -> tuple[float, ...]:
    half = 1 << (bits - 1)
    if kind == "int":
        return tuple(float(level) for level in range(1 - half if pinned else -half, half))
    if kind == "uint":
        return tuple(float(level) for level in range(2 * half))
    if kind == "powers":
        magnitudes = [2.0**-k for k in range(half - 1)]
        return (*(-m for m in magnitudes), 0.0, *reversed(magnitudes))
    found = {"nf4": NF4, "fp4": FP4, "codebook": table}.get(kind)
    assert found, f"{kind} is none of {KINDS}"
    return found


def scales(matrix: Tensor, grid: Grid) -> Tensor:
    """(out, in) -> (out, groups): max |w| / largest level, never 0, in the dtype of `matrix`; for grids around 0. Of a
    group of zeros 1, on a `pinned` grid next to nothing: its container finds 0, and may take means over scales.

    With it, quantizing twice gives the same values; not for 8 bits in 16-bit dtypes, which cannot hold level * s:
    there a second rounding moves about one code in a hundred by one step.

    Raises:
        CompressError: weights that are not finite; the group size does not divide the inputs; a ``uint`` grid.
    """
    if grid.kind == "uint":
        raise CompressError(
            "a grid with zero points is not one around 0",
            where="quantization grid",
            next_step="kind int, or a solver that finds zero points (rtn, hqq)",
        )
    top = _finite(grid.groups(matrix).abs().amax(-1).float())
    limits = torch.finfo(matrix.dtype)
    size = torch.where(top > 0, top / grid.largest, limits.smallest_normal if grid.pinned else 1.0)
    least = limits.smallest_normal * limits.eps  # fp16 counts what is below the smallest normal number in steps of it
    return torch.where(size < limits.smallest_normal, (size / least).ceil() * least, size).to(matrix.dtype)


def min_max(matrix: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(out, in) -> scale and zero, (out, groups) each, of a ``uint`` grid: it spans the group's range and 0, and zero
    is the level at which 0 lies exactly.

    Raises:
        CompressError: as `scales`.
    """
    grouped = grid.groups(matrix).float()
    low, high = _finite(grouped.amin(-1)).clamp(max=0), _finite(grouped.amax(-1)).clamp(min=0)
    steps = grid.levels()[-1]
    scale = torch.where(high > low, (high - low) / steps, torch.ones_like(high)).to(matrix.dtype)
    return scale, (-low / scale.float()).round().clamp(0, steps)


def _finite(found: Tensor) -> Tensor:
    if not torch.isfinite(found).all():
        raise CompressError(
            "weights are not finite",
            where="quantization grid",
            next_step="check the checkpoint, or the training that made it",
        )
    return found


def codes(matrix: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None = None) -> Tensor:
    """The level of each weight, in fp32 (out, in): nearest(w / s + zero). 0 stays 0, and for integer grids
    |w - (code - zero) * s| <= |s| / 2 inside the range (before code * s is rounded to a 16-bit dtype: up to |s|
    then)."""
    ratio = grid.groups(matrix).float() / scale[..., None].float()
    if grid.pinned:
        ratio.nan_to_num_(0.0)  # of groups of zeros, whose scale may be stored as 0
    return grid.nearest(ratio if zero is None else ratio + zero[..., None]).flatten(1)


def from_codes(levels: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Levels (out, in), scales and zeros (out, groups) -> (level - zero) * s, (out, in) in the dtype of the scales."""
    grouped: Tensor = levels.unflatten(1, (scale.shape[1], -1)).float()
    if zero is not None:
        grouped = grouped - zero[..., None]
    return (grouped * scale[..., None].float()).flatten(1).to(scale.dtype)


def fake_quantize(matrix: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None = None) -> Tensor:
    """The nearest point to each weight, rounded once to the dtype of the scales, (out, in)."""
    return from_codes(codes(matrix, scale, grid, zero), scale, zero)


def spanning(matrix: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero, (out, groups) each, at which nothing is clipped: `min_max` of ``uint`` grids, else `scales` and
    no zero."""
    return min_max(matrix, grid) if grid.kind == "uint" else (scales(matrix, grid), None)


def fake_quantize_ste(matrix: Tensor, grid: Grid) -> Tensor:
    """`fake_quantize` at the scale that clips nothing, with the straight-through gradient d out / d matrix = 1.

    Bengio et al. 2013, https://arxiv.org/abs/1308.3432.
    """
    with torch.no_grad():
        scale, zero = spanning(matrix, grid)
        rounded = fake_quantize(matrix, scale, grid, zero)
    return straight_through(matrix, rounded)


def straight_through(given: Tensor, rounded: Tensor) -> Tensor:
    """The values of `rounded`, exactly, with d out / d given = 1."""
    through: Tensor = _Through.apply(given, rounded)  # type: ignore[no-untyped-call]
    return through


def fake_quantize_lsq(matrix: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None = None) -> Tensor:
    """The nearest point to each weight, (out, in), with gradients for the weights and for their scales (out, groups):

        d out / d w = 1 inside the levels, 0 where w is clipped
        d out / d s = l - r inside, with r = w / s + zero and l its nearest level; l - zero where w is clipped

    Learned step size quantization, Esser et al. 2020, https://arxiv.org/abs/1902.08153 (there integers, no zero); its
    factor 1 / sqrt(N Qp) is left to the caller. Where the grid is `pinned`, the largest weight of each group stands at
    the largest level: d out / d s = l, and d out / d w = 1, so that it still trains.
    """
    found: Tensor = _Learned.apply(matrix, scale, grid, zero)  # type: ignore[no-untyped-call]
    return found


def at_scale(matrix: Tensor, first: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None = None) -> Tensor:
    """The levels on which `matrix` (out, in) stands at the scales `first`, at other scales (both (out, groups)):
    (level - zero) * s, with the gradient d out / d s = level - zero = w / first, summed over each group; no other. It
    keeps nothing for it but what it is given. zero: (out, groups), of grids that have one.

    The second phase of EfficientQAT, Chen et al. 2024, https://arxiv.org/abs/2407.11062.
    """
    found: Tensor = _AtScale.apply(matrix, first, scale, grid, zero)  # type: ignore[no-untyped-call]
    return found


def first_scales(matrix: Tensor, grid: Grid) -> Tensor:
    """(out, in) -> (out, groups) in fp32: where LSQ's paper starts, 2 mean |w| / sqrt(Qp), Qp = 2^(b-1) - 1 (times
    Qp / `Grid.largest` for levels that are not counted in ones); never 0."""
    count = float((1 << (grid.bits - 1)) - 1)
    size = 2 * _finite(grid.groups(matrix).abs().float().mean(-1)) * count**0.5 / grid.largest
    return torch.where(size > 0, size, torch.ones_like(size))


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None) -> Tensor:
        origin = 0.0 if zero is None else zero[..., None]
        ratio = grid.groups(matrix).float() / scale[..., None].float() + origin
        level, ends = grid.nearest(ratio), grid.levels()
        inside = (ratio > ends[0]) & (ratio < ends[-1])
        slope = torch.where(inside, level - ratio, level - origin)
        if (pins := pinned(matrix, grid)) is not None:
            pins = grid.groups(pins)
            level = torch.where(pins, ratio.sign() * grid.largest, level)
            slope, inside = torch.where(pins, level, slope), inside | pins
        ctx.save_for_backward(slope, inside)
        ctx.dtypes = matrix.dtype, scale.dtype
        return from_codes(level.flatten(1), scale, zero)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, inside = ctx.saved_tensors
        matrix, scale = ctx.dtypes
        grouped = gradient[0].float().view_as(slope)
        return (grouped * inside).flatten(1).to(matrix), (grouped * slope).sum(-1).to(scale), None, None


class _AtScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, first: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None) -> Tensor:
        ctx.save_for_backward(matrix, first)
        return from_codes(codes(matrix, first, grid, zero), scale, zero)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, None, Tensor, None, None]:
        matrix, first = ctx.saved_tensors
        steps = (gradient[0].float() * matrix.float()).unflatten(1, (first.shape[1], -1)).sum(-1)
        return None, None, (steps / first.float()).to(first.dtype), None, None


def searched_scales(matrix: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """(out, in) -> (out, groups): of scales that clip more or less, for grids around 0, the one with the least

        sum over the group of importance_j (w_j - point_j)^2

    importance: (in,), such as the mean square of each input; None: all alike. An integer grid reaches one step further
    below 0 than above, so negative scales are tried too. In the dtype of `matrix`.

    Raises:
        CompressError: as `scales`.
    """
    widest = scales(matrix, grid)
    grouped = grid.groups(matrix).float()
    weight = torch.ones(matrix.shape[1], device=matrix.device) if importance is None else importance.float()
    weight = weight.view(grouped.shape[1:])
    pins = pinned(matrix, grid)
    best, least = widest, torch.full(widest.shape, float("inf"), device=matrix.device)
    signs = (1.0, -1.0) if grid.levels()[0] < -grid.largest else (1.0,)
    for shrink in torch.linspace(1.1, 0.3, 33).tolist():
        for sign in signs:
            tried = (widest.float() * (sign * shrink)).to(matrix.dtype)
            stored = grid.stored(tried)
            ratio = grouped / stored[..., None].float()
            level = grid.nearest(ratio)
            if pins is not None:
                level = torch.where(grid.groups(pins), ratio.sign() * grid.largest, level)
            error = ((ratio - level).square_() * weight).sum(-1) * stored.float().square()
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def pinned(matrix: Tensor, grid: Grid) -> Tensor | None:
    """(out, in) bool: the weight of each group that must stand at the largest magnitude, where the grid is `pinned`:
    the one that is largest already."""
    if not grid.pinned:
        return None
    grouped = grid.groups(matrix).abs()
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, grouped.argmax(-1, keepdim=True), True).flatten(1)


def k_means(matrix: Tensor, bits: int, group_size: int | None = None, *, steps: int = 20) -> Grid:
    """A ``codebook`` grid fitted to a matrix (out, in): Lloyd's iterations on its weights over their group's max |w|,
    one level held at 0. Starts from quantiles, so it is deterministic. No container stores it: for analysis and QAT.
    """
    plain = Grid(bits, group_size)
    top = scales(matrix, plain).float()[..., None] * plain.largest
    points = (plain.groups(matrix).float() / top).flatten()
    points = points.sort().values
    places = torch.linspace(0, len(points) - 1, 1 << bits, dtype=torch.float64, device=matrix.device).round().long()
    levels = points[places]
    totals = torch.cat([points.new_zeros(1, dtype=torch.float64), points.double().cumsum(0)])
    for _ in range(steps):
        levels[levels.abs().argmin()] = 0
        ends = torch.searchsorted(points, (levels[1:] + levels[:-1]) / 2)
        bounds = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(points))])
        count = bounds.diff()
        mean = ((totals[bounds[1:]] - totals[bounds[:-1]]) / count.clamp_min(1)).float()
        levels = torch.where(count > 0, mean, levels).sort().values
    levels[levels.abs().argmin()] = 0
    levels = levels.sort().values
    return Grid(bits, group_size, "codebook", tuple(levels.tolist()))
