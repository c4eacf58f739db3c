"""How one parameter is rounded while it trains: its grid, and its scales where they do not follow the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hf_compress.errors import CompressError, at
from hf_compress.grids import (
    Grid,
    at_scale,
    fake_quantize_lsq,
    fake_quantize_ste,
    first_scales,
    k_means,
    searched_scales,
    spanning,
)
from hf_compress.weights import Weight


class Rounding:
    """``Rounding(parts, Grid(4, 32), learn=True)(stored)``: the parameter with every group on its grid.

    parts: the weights that make up the parameter (all its experts, or itself); rows are theirs, one after another.
    Scales are the ones that clip nothing, found anew at each call, until they are learned or frozen. A learned scale
    is sign * exp(theta), and theta trains: it neither becomes 0 nor changes sign, and a step changes it by a share of
    itself. Its gradient is that of `fake_quantize_lsq` over sqrt(N Qp), N weights to a scale, Qp = 2^(b-1) - 1.

    fixed: the levels stay those that `begin` found, and puts into the parameter; it takes no gradient, and a learned
    scale has that of level * scale: d out / d s = level, over the same root.

    Raises:
        CompressError: weights that are not finite, or packed.
    """

    def __init__(
        self, parts: Sequence[Weight], grid: Grid, *, learn: bool = False, fixed: bool = False, start: str = "search"
    ) -> None:
        self.parts, self.grid, self._start, self._fixed = parts, grid, start, fixed
        self.name, self._dtype = parts[0].parameter, parts[0].matrix.dtype
        self._slow = (self._group * max(1, (1 << (grid.bits - 1)) - 1)) ** -0.5
        with at(parts[0].name):
            shape = spanning(self._rows(parts[0].whole.detach()), Grid(grid.bits, grid.group_size))[0].shape
        self.theta = nn.Parameter(torch.zeros(shape, device=parts[0].whole.device)) if learn else None
        self._kept: dict[str, Tensor] = {}  # sign, scale (frozen), zero, first (the scale that fixed levels count in)

    @property
    def _group(self) -> int:
        return self.grid.group_size or self.parts[0].shape[1]

    def _rows(self, stored: Tensor) -> Tensor:
        return (stored.T if self.parts[0].transposed else stored.flatten(0, -2)).to(self._dtype)

    @torch.no_grad()
    def begin(self, stored: Tensor, scales: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Fit the codebook, and learned scales, to the weights as they are now. scales: by weight name, (out, groups)
        that they stand on already."""
        rows = self._rows(stored)
        if self.grid.kind == "codebook":
            self.grid = k_means(rows, self.grid.bits, self.grid.group_size)
        if self.theta is not None:
            if scales:
                scale = torch.cat([scales[part.name] for part in self.parts])
            elif self.grid.kind == "uint":
                scale, self._kept["zero"] = spanning(rows, self.grid)  # type: ignore[assignment]
            else:
                scale = first_scales(rows, self.grid) if self._start == "mean" else searched_scales(rows, self.grid)
            zeros = (self.grid.groups(rows) == 0).all(-1)  # they must be able to grow
            scale = scale.masked_fill(zeros, 1.0)
            self.theta.copy_(scale.float().abs().log())
            self._kept["sign"] = scale.float().sign()
        if self._fixed:
            scale, zero = self._scale(rows)
            self.parts[0].whole.copy_(self._as_stored(fake_quantize_lsq(rows, scale, self.grid, zero)))
            self._kept["first"] = scale.clone()

    @torch.no_grad()
    def freeze(self, stored: Tensor) -> None:
        """Scales stay as they are now."""
        scale, zero = self._scale(self._rows(stored))
        self._kept["scale"] = scale.clone()
        if zero is not None:
            self._kept["zero"] = zero

    @property
    def frozen(self) -> bool:
        return "scale" in self._kept

    def _scale(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.frozen:
            return self._kept["scale"], self._kept.get("zero")
        if self.theta is None:
            return spanning(rows, self.grid)
        size = self.theta.exp().clamp_min(torch.finfo(self._dtype).tiny)
        if size.requires_grad:
            size.register_hook(lambda gradient: gradient * self._slow)
        return (self._kept["sign"] * size).to(self._dtype), self._kept.get("zero")

    def __call__(self, stored: Tensor) -> Tensor:
        """As stored, differentiable in `stored` and theta."""
        rows = self._rows(stored)
        if self.theta is None and not self.frozen:
            return self._as_stored(fake_quantize_ste(rows, self.grid))
        scale, zero = self._scale(rows)
        if self._fixed:
            return self._as_stored(at_scale(rows.detach(), self._kept["first"], scale, self.grid, zero))
        return self._as_stored(fake_quantize_lsq(rows, scale, self.grid, zero))

    def _as_stored(self, rows: Tensor) -> Tensor:
        return rows.T if self.parts[0].transposed else rows.view(self.parts[0].whole.shape)

    @torch.no_grad()
    def bake(self) -> dict[str, Tensor]:
        """Leave the rounded values in the parameter; weight name -> the scales (out, groups) they stand on."""
        whole = self.parts[0].whole
        scale, _ = self._scale(self._rows(whole))
        whole.copy_(self(whole))
        return {part.name: one.clone() for part, one in zip(self.parts, scale.chunk(len(self.parts)), strict=True)}

    def to(self, device: torch.device) -> None:
        self._kept = {key: value.to(device) for key, value in self._kept.items()}
        if self.theta is not None:
            self.theta.data = self.theta.data.to(device)

    def state(self) -> dict[str, Tensor]:
        learned = {} if self.theta is None else {"theta": self.theta}
        table = {"table": torch.tensor(self.grid.table, dtype=torch.float64)} if self.grid.table else {}
        return learned | table | self._kept

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`.

        Raises:
            CompressError: learned scales where none are, or of another shape.
        """
        given = dict(state)
        theta, table, device = given.pop("theta", None), given.pop("table", None), self.parts[0].whole.device
        ours = None if self.theta is None else self.theta.shape
        if ours != (None if theta is None else theta.shape) or ("first" in given) != self._fixed:
            raise CompressError(
                "the scales of the checkpoint are not those of this run's grid",
                where=self.name,
                next_step="resume with the bits, group size and method that were interrupted",
            )
        if theta is not None and self.theta is not None:
            self.theta.data.copy_(theta)
        if table is not None:
            self.grid = Grid(self.grid.bits, self.grid.group_size, "codebook", tuple(table.tolist()))
        self._kept = {key: value.to(device) for key, value in given.items()}
