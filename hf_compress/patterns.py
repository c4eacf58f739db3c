"""Scores -> mask. Knows nothing about models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.errors import CompressError

GROUPS = ("row", "layer", "global")
"""What an unstructured pattern compares: the scores of each output row, of each matrix, of all matrices."""


class NM(NamedTuple):
    """``keep:of``: in every `of` consecutive inputs of a row, `keep` are kept."""

    keep: int
    of: int


@dataclass(frozen=True)
class Block:
    """``RxC``: tiles of `rows` outputs by `columns` inputs, kept or dropped whole."""

    rows: int
    columns: int


def parse_pattern(pattern: str) -> NM | Block | None:
    """None for ``unstructured``; ``2:4`` and ``4x1`` for the others.

    Raises:
        CompressError: anything else; N:M without 0 < N < M; a block of one weight or none.
    """
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+)([:x])(\d+)", pattern)
    if found is not None:
        first, second = int(found[1]), int(found[3])
        if found[2] == ":" and 0 < first < second:
            return NM(first, second)
        if found[2] == "x" and first * second > 1:
            return Block(first, second)
    raise CompressError(
        f"unknown pattern {pattern!r}",
        where="pattern",
        next_step="unstructured; N:M with 0 < N < M, such as 2:4; or blocks of outputs x inputs, such as 4x1",
    )


def check_target(sparsity: float, pattern: str) -> None:
    """Raise a CompressError unless `sparsity` is what `pattern` can reach: in [0, 1), and 1 - N/M for N:M."""
    if not 0 <= sparsity < 1:
        raise CompressError(
            f"sparsity {sparsity:g} is not in [0, 1)",
            where="sparsity",
            next_step="the share of weights to drop, such as 0.5",
        )
    parsed = parse_pattern(pattern)
    if isinstance(parsed, NM) and abs(sparsity - (1 - parsed.keep / parsed.of)) > 1e-6:
        implied = 1 - parsed.keep / parsed.of
        raise CompressError(
            f"{pattern} keeps {parsed.keep} of {parsed.of}, which is a sparsity of {implied:g}, not {sparsity:g}",
            where="sparsity",
            next_step=f"sparsity: {implied:g}, or another pattern",
        )


def check_fits(shape: tuple[int, int], pattern: str, *, where: str) -> None:
    """Raise a CompressError, at the weight named `where`, unless the pattern's sizes divide its (out, in)."""
    parsed = parse_pattern(pattern)
    sizes = (1, 1)
    if isinstance(parsed, NM):
        sizes = (1, parsed.of)
    elif isinstance(parsed, Block):
        sizes = (parsed.rows, parsed.columns)
    for size, length, what in zip(sizes, shape, ("outputs", "inputs"), strict=True):
        if length % size:
            raise CompressError(
                f"pattern {pattern}: {size} does not divide {length} {what}",
                where=where,
                next_step="skip this weight, or use unstructured",
            )


def mask_of(
    scores: Tensor,
    *,
    sparsity: float,
    pattern: str = "unstructured",
    group: str = "layer",
    within: Tensor | None = None,
) -> Tensor:
    """Boolean mask (out, in), True = keep the highest scores.

    unstructured: exactly ``round(sparsity * n)`` of each comparison group of n scores is dropped, a group being the
    whole matrix (``layer``) or each row (``row``; see `global_masks` for the third). N:M: in every M consecutive
    inputs of a row, ``floor(sparsity * M)`` is dropped, at most M - N (less than that only on the way of a schedule;
    see `check_target`). RxC: as unstructured over tiles, each scored by its sum; a row is a row of tiles.
    Ties: the lower index is kept, so equal input gives equal masks, and those of a higher sparsity are nested in
    those of a lower one.

    within: an earlier mask (out, in): what it dropped goes first, so with no lower sparsity the new mask lies in it.

    Raises:
        CompressError: sparsity outside [0, 1); the pattern's sizes do not divide the matrix; scores that are not
        finite.
    """
    _check(scores, sparsity, pattern)
    parsed = parse_pattern(pattern)
    if isinstance(parsed, Block):
        return _tiled(_keep(_tiles(scores, within, parsed), sparsity, group), parsed)
    scores = _known(scores, within)
    if isinstance(parsed, NM):
        return _keep_of_m(scores, parsed.of, min(parsed.of - parsed.keep, int(sparsity * parsed.of + 1e-9)))
    return _keep(scores, sparsity, group)


def global_masks(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    pattern: str = "unstructured",
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of several matrices under one threshold: of all N scores together ``round(sparsity * N)`` are dropped.

    Ties: the earlier matrix, then the lower index, is kept. Blocks are counted and compared as blocks.

    Raises:
        CompressError: as `mask_of`; N:M, whose groups are its own.
    """
    parsed = parse_pattern(pattern)
    if isinstance(parsed, NM):
        raise CompressError(
            f"{pattern} compares within groups of {parsed.of} inputs, not over the whole model",
            where="group",
            next_step="leave group out, or use unstructured",
        )
    found = {}
    for name, each in scores.items():
        _check(each, sparsity, pattern, where=name)
        earlier = None if within is None else within[name]
        found[name] = _tiles(each, earlier, parsed) if isinstance(parsed, Block) else _known(each, earlier)
    drop = round(sparsity * sum(each.numel() for each in found.values()))
    masks = _drop_lowest(list(found.values()), drop)
    return {
        name: _tiled(mask, parsed) if isinstance(parsed, Block) else mask
        for name, mask in zip(found, masks, strict=True)
    }


def _check(scores: Tensor, sparsity: float, pattern: str, where: str = "mask_of") -> None:
    if not 0 <= sparsity < 1:
        raise CompressError(f"sparsity {sparsity:g} is not in [0, 1)", where=where)
    check_fits((scores.shape[0], scores.shape[1]), pattern, where=where)
    if not torch.isfinite(torch.stack(scores.aminmax())).all():
        raise CompressError(
            "importance scores are not finite",
            where=where,
            next_step="look for NaN in the weights or calibration data",
        )


def _known(scores: Tensor, within: Tensor | None) -> Tensor:
    return scores if within is None else scores.masked_fill(~within, -torch.inf)


def _keep(scores: Tensor, sparsity: float, group: str) -> Tensor:
    """Drop exactly ``round(sparsity * n)`` of each row, or of the whole."""
    rows = scores if group == "row" else scores.reshape(1, -1)
    drop = round(sparsity * rows.shape[1])
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = rows.kthvalue(drop, dim=1, keepdim=True).values
    mask = rows > threshold
    ties = rows == threshold
    spare = rows.shape[1] - drop - mask.sum(1, keepdim=True)  # how many of the ties are kept
    if torch.equal(spare, torch.zeros_like(spare)):
        return mask.reshape(scores.shape)
    mask |= ties & (ties.cumsum(1, dtype=torch.int32) <= spare)
    return mask.reshape(scores.shape)


def _keep_of_m(scores: Tensor, of: int, drop: int) -> Tensor:
    """Drop `drop` of every `of` consecutive scores of a row: a score is kept when fewer than of - drop beat it."""
    columns = scores.reshape(-1, of).T.contiguous()  # (M, groups)
    beaten = torch.zeros_like(columns, dtype=torch.uint8 if of < 256 else torch.int32)
    for i in range(of):
        for j in range(i):
            first = columns[j] >= columns[i]  # j is the lower index: it wins a tie
            beaten[i] += first
            beaten[j] += ~first
    return (beaten < of - drop).T.reshape(scores.shape)


def _drop_lowest(parts: list[Tensor], drop: int) -> list[Tensor]:
    """Masks that drop the `drop` lowest scores of all parts, found without joining them.

    A float's bits, read as an integer with the negative ones turned round, are in the order of the floats: counting
    the upper and then the lower 16 bits finds the threshold's bits.
    """
    if drop == 0:
        return [torch.ones_like(part, dtype=torch.bool) for part in parts]
    upper, below = _bin_of([_ordered(part) >> 16 for part in parts], drop, offset=32768)
    inside = [_ordered(part) for part in parts]
    lower, more = _bin_of([x[(x >> 16) == upper] & 0xFFFF for x in inside], drop - below, offset=0)
    threshold, spare = (upper << 16) + lower, drop - below - more  # of the scores at the threshold, `spare` go
    ties = sum(int((x == threshold).sum()) for x in inside)
    kept = ties - spare
    masks = []
    for bits in inside:
        at = bits == threshold
        masks.append((bits > threshold) | (at & (at.flatten().cumsum(0).view_as(at) <= kept)))
        kept = max(0, kept - int(at.sum()))
    return masks


def _ordered(scores: Tensor) -> Tensor:
    """fp32 -> int32 in the same order; -0.0 counts as 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _bin_of(values: list[Tensor], place: int, *, offset: int) -> tuple[int, int]:
    """The value at `place` (from 1) of all the integers in order, and how many are smaller; 2^16 values."""
    counts = torch.stack([torch.bincount(v.flatten() + offset, minlength=65536).cpu() for v in values]).sum(0)
    upto = counts.cumsum(0)
    index = int(torch.searchsorted(upto, place))
    return index - offset, int(upto[index] - counts[index])


def _tiles(scores: Tensor, within: Tensor | None, block: Block) -> Tensor:
    """(out, in) -> (out / rows, in / columns): sums; -inf for tiles that an earlier mask dropped."""
    shape = (scores.shape[0] // block.rows, block.rows, scores.shape[1] // block.columns, block.columns)
    sums = scores.reshape(shape).sum((1, 3))
    return sums if within is None else _known(sums, within.reshape(shape)[:, 0, :, 0])


def _tiled(mask: Tensor, block: Block) -> Tensor:
    return mask.repeat_interleave(block.rows, 0).repeat_interleave(block.columns, 1)
