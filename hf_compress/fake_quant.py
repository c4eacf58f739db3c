"""Uniform symmetric integer grids: matrix -> scales -> codes -> matrix. Knows nothing about models or containers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import CompressError


@dataclass(frozen=True)
class Grid:
    """Signed codes in [-(2^(bits-1) - 1), 2^(bits-1) - 1]; `group_size` inputs of a row share a scale (None: the
    whole row)."""

    bits: int
    group_size: int | None = None

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

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


def scales(matrix: Tensor, grid: Grid) -> Tensor:
    """(out, in) -> (out, groups): max |w| / largest code, never 0, in the dtype of `matrix`.

    With it, quantizing twice gives the same values; not for 8 bits in 16-bit dtypes, which cannot hold code * s: there
    a second rounding moves about one code in a hundred by one step.

    Raises:
        CompressError: weights that are not finite; the group size does not divide the inputs.
    """
    top = grid.groups(matrix).abs().amax(-1).float()
    if not torch.isfinite(top).all():
        raise CompressError(
            "weights are not finite",
            where="quantization grid",
            next_step="check the checkpoint, or the training that made it",
        )
    return torch.where(top > 0, top / grid.largest, torch.ones_like(top)).to(matrix.dtype)


def codes(matrix: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """clip(round(w / s)), in fp32: int8 (out, in); 0 stays 0 and |w - code * s| <= s / 2 inside the range
    (before code * s is rounded to a 16-bit dtype: up to s then)."""
    exact = grid.groups(matrix).float() / scale[..., None].float()
    return exact.round().clamp(-grid.largest, grid.largest).flatten(1).to(torch.int8)


def fake_quantize(matrix: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """code * s, rounded once to the dtype of `matrix`, (out, in)."""
    return from_codes(codes(matrix, scale, grid), scale)


def from_codes(rounded: Tensor, scale: Tensor) -> Tensor:
    """Codes (out, in) and scales (out, groups) -> code * s, (out, in) in the dtype of the scales."""
    grouped: Tensor = rounded.unflatten(1, (scale.shape[1], -1)).float()
    return (grouped * scale[..., None].float()).flatten(1).to(scale.dtype)


def fake_quantize_ste(matrix: Tensor, grid: Grid) -> Tensor:
    """`fake_quantize` at the absmax scale with the straight-through gradient, d out / d matrix = 1 (nothing is
    clipped at absmax).

    Bengio et al. 2013, https://arxiv.org/abs/1308.3432.
    """
    with torch.no_grad():
        error = fake_quantize(matrix, scales(matrix, grid), grid) - matrix
    return matrix + error
