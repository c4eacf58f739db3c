"""Scores -> mask. Knows nothing about models."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from hf_compress.errors import CompressError


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """None for ``unstructured``; (N, M) for ``N:M``: N of every M consecutive inputs are kept.

    Raises:
        CompressError: anything else, or not 0 < N < M.
    """
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise CompressError(
            f"unknown pattern {pattern!r}",
            where="pattern",
            next_step="unstructured, or N:M with 0 < N < M, such as 2:4",
        )
    return int(found[1]), int(found[2])


def check_target(sparsity: float, pattern: str) -> None:
    """Raise a CompressError unless `sparsity` is what `pattern` can reach: between 0 and 1, and 1 - N/M for N:M."""
    if not 0 < sparsity < 1:
        raise CompressError(f"sparsity {sparsity} is not between 0 and 1", where="sparsity")
    nm = parse_pattern(pattern)
    if nm is not None and abs(sparsity - (1 - nm[0] / nm[1])) > 1e-6:
        raise CompressError(
            f"{pattern} keeps {nm[0]} of {nm[1]}, which is a sparsity of {1 - nm[0] / nm[1]:g}, not {sparsity:g}",
            where="sparsity",
            next_step=f"sparsity: {1 - nm[0] / nm[1]:g}, or another pattern",
        )


def mask_of(scores: Tensor, *, sparsity: float, pattern: str = "unstructured", group: str = "layer") -> Tensor:
    """Boolean mask (out, in), True = keep the highest scores.

    unstructured: exactly ``round(sparsity * n)`` of each comparison group of n scores is dropped, a group being the
    whole matrix (``layer``) or each row (``row``). N:M: in every M consecutive inputs of a row, ``floor(sparsity *
    M)`` is dropped, at most M - N (less than that only on the way of a schedule; see `check_target`).
    Ties: the lower index is kept, so equal input gives equal masks.

    Raises:
        CompressError: M does not divide the inputs; scores that are not finite.
    """
    if not torch.isfinite(scores).all():
        raise CompressError(
            "importance scores are not finite",
            where="mask_of",
            next_step="look for NaN in the weights or calibration data",
        )
    nm = parse_pattern(pattern)
    if nm is not None:
        keep, of = nm
        if scores.shape[1] % of:
            raise CompressError(
                f"{of} does not divide {scores.shape[1]} inputs",
                where=f"pattern {pattern}",
                next_step="skip this weight, or use unstructured",
            )
        rows, drop = scores.reshape(-1, of), min(of - keep, int(sparsity * of + 1e-9))
    else:
        rows = scores if group == "row" else scores.reshape(1, -1)
        drop = round(sparsity * rows.shape[1])
    order = rows.argsort(dim=1, descending=True, stable=True)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, order[:, rows.shape[1] - drop :], False)
    return mask.reshape(scores.shape)
