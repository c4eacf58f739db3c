"""Rows that a matrix reads -> the sums a solver needs. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_compress.criteria import Statistics
from hf_compress.precision import rough

PANEL = 256  # columns of a Gram matrix made at once: only the panels on and above its diagonal are multiplied


class Sums:
    """Running sums over the rows of one input.

    Args:
        needs: the `Statistics` fields to make; ``folds`` keeps the two halves of the text apart.
        routed: each call brings another number of rows (see `calibrating`).
    """

    def __init__(self, needs: Iterable[str], *, routed: bool = False) -> None:
        self.needs = frozenset(needs)
        self._factor = torch.Tensor.float if routed else rough
        self._folds = [Statistics(), Statistics()] if "folds" in self.needs else [Statistics()]

    def add(self, rows: Tensor, fold: Tensor, dense: Tensor | None = None, shift: Tensor | None = None) -> None:
        """rows (n, in) of the compressed model; fold (n,) 0 or 1, the half of the calibration text each belongs to.

        dense: (n, in), what the dense model reads at the same tokens. shift: (n, out), dense minus compressed
        residual stream there.
        """
        if len(self._folds) == 1:
            self._add(self._folds[0], rows.float(), dense, shift)
            return
        for index, sums in enumerate(self._folds):
            half = fold == index
            parts = [None if t is None else t[half] for t in (dense, shift)]
            self._add(sums, rows[half].float(), *parts)

    def _add(self, sums: Statistics, rows: Tensor, dense: Tensor | None, shift: Tensor | None) -> None:
        width = rows.shape[1]
        sums.tokens += len(rows)
        if "input_norm" in self.needs:  # its square, until `statistics`
            square = rows.square().sum(0)
            sums.input_norm = square if sums.input_norm is None else sums.input_norm + square
        if "input_max" in self.needs:
            largest = rows.abs().amax(0) if len(rows) else rows.new_zeros(width)
            sums.input_max = largest if sums.input_max is None else sums.input_max.maximum(largest)
        if "hessian" in self.needs:
            sums.hessian = rows.new_zeros(width, width) if sums.hessian is None else sums.hessian
            for start in range(0, width, PANEL):
                panel = rows[:, start : start + PANEL]
                sums.hessian[start : start + PANEL, start:].addmm_(panel.T, rows[:, start:])
        if "drift" in self.needs and dense is not None:
            sums.drift = rows.new_zeros(width, width) if sums.drift is None else sums.drift
            sums.drift += self._factor(dense.float() - rows).T @ self._factor(rows)
        if "drift" in self.needs and shift is not None:
            sums.residual = rows.new_zeros(shift.shape[1], width) if sums.residual is None else sums.residual
            sums.residual += self._factor(shift.float()).T @ self._factor(rows)

    def statistics(self) -> Statistics:
        """What the rows come to; with ``folds``, also of each half. Call it once: the sums become what it returns."""
        for sums in self._folds:
            if sums.hessian is not None:
                for start in range(0, len(sums.hessian), PANEL):  # copy the panels above the diagonal to below it
                    right = sums.hessian[start : start + PANEL, start + PANEL :]
                    sums.hessian[start + PANEL :, start : start + PANEL] = right.T
            if sums.input_norm is not None:
                sums.input_norm = sums.input_norm.sqrt()
        if len(self._folds) == 1:
            return self._folds[0]
        total = mixed(self._folds, [1.0, 1.0])
        total.folds = tuple(self._folds)
        return total


def mixed(parts: list[Statistics], shares: list[float]) -> Statistics:
    """Weighted sum of statistics of one input (input norms are summed as squares, maxima stay maxima); `tokens` is the
    plain sum."""

    def total(tensors: list[Tensor | None]) -> Tensor | None:
        given = [t * share if share != 1 else t for t, share in zip(tensors, shares, strict=True) if t is not None]
        return sum(given[1:], start=given[0]) if given else None

    largest = [p.input_max for p in parts if p.input_max is not None]
    square = total([None if p.input_norm is None else p.input_norm.square() for p in parts])
    return Statistics(
        tokens=sum(p.tokens for p in parts),
        input_norm=None if square is None else square.sqrt(),
        input_max=torch.stack(largest).amax(0) if largest else None,
        hessian=total([p.hessian for p in parts]),
        drift=total([p.drift for p in parts]),
        residual=total([p.residual for p in parts]),
    )


def pooled(parts: Iterable[Statistics]) -> Statistics:
    """The sum of many, of which only one is held at a time; the halves are summed as halves."""
    total: Statistics | None = None
    for part in parts:
        if total is None:
            total = part
            continue
        folds = tuple(mixed([a, b], [1.0, 1.0]) for a, b in zip(total.folds, part.folds, strict=True))
        total = mixed([total, part], [1.0, 1.0])
        total.folds = folds
    assert total is not None
    return total


def featureless(one: Statistics) -> Statistics:
    """What `one` says of an input whose features are not its own: all of them alike and uncorrelated, of the mean size
    of one's. For the channels of an expert, which mean nothing in another expert.

    The dense model's inputs are taken to be this model's, so nothing is followed.
    """
    found = Statistics(tokens=one.tokens, folds=tuple(featureless(half) for half in one.folds))
    if one.input_norm is not None:
        found.input_norm = torch.full_like(one.input_norm, float(one.input_norm.square().mean().sqrt()))
    if one.hessian is not None:
        found.hessian = torch.eye(len(one.hessian), device=one.hessian.device) * one.hessian.diagonal().mean()
        found.drift = torch.zeros_like(found.hessian) if one.drift is not None else None
    return found


def shrunk(own: Statistics, layer: Statistics, prior: float) -> Statistics:
    """Statistics of an expert that saw few tokens, drawn toward its layer's: (1 - w) own / n + w layer / N a token,
    w = prior / (n + prior), so that `prior` tokens of the layer stand beside its own n; in the scale of n tokens.
    Each half of the text is drawn toward the same half of the layer's."""
    share = prior / (own.tokens + prior)

    def drawn(one: Statistics, everybody: Statistics) -> Statistics:
        scale = max(1, one.tokens) / max(1, everybody.tokens)
        made = mixed([one, everybody], [1 - share, share * scale])
        made.tokens = one.tokens
        return made

    made = drawn(own, layer)
    made.folds = tuple(drawn(half, other) for half, other in zip(own.folds, layer.folds, strict=True))
    return made
