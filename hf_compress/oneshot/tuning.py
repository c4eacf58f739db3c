"""Let what a solver left of a block move together, toward what the dense block answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_compress.grids import Grid, codes, from_codes
from hf_compress.oneshot.calls import Block, Call
from hf_compress.oneshot.gradients import only_these_train
from hf_compress.weights import Weight

WARMUP = 4  # steps
STEP_TOKENS, STEPS = 512, 32  # of a batch, at most; and how many there should be, at least: many small steps over the
# text once do as well as few large ones over it twice


@dataclass(frozen=True)
class Tuning:
    """epochs: passes over the calibration text. rate: of Adam, falling linearly to 0; in units of the root mean square
    of the weights that are left of a matrix, or of the mean gap of levels where weights are rounded. grid: weight name
    -> its grid, where they are."""

    epochs: int = 1
    rate: float = 0.01
    grid: Callable[[str], Grid] | None = None


@dataclass
class Rounded:
    """A weight on a grid, and how near each level is to the next: scale (out, groups); ratio (out, in), w / scale
    before rounding, NaN where the level is fixed."""

    scale: Tensor
    ratio: Tensor


def tune(
    block: Block,
    calls: list[Call],
    weights: Sequence[Weight],
    tuning: Tuning,
    rounded: Mapping[str, Rounded] | None = None,
) -> list[float]:
    """Minimise over what may move of `weights`, in place, by Adam, a batch a step:

        mean over tokens of ||block(x) - d||^2 / ||d||^2

    x what the compressed model hands to the block, d the dense model's output of it (`Call.dense`), both (batch,
    tokens, hidden). Solvers see one matrix at a time and no nonlinearity; here they make up for each other. A token
    counts by its relative error, as the norm of whatever reads the stream next will see it: in absolute size a few
    outlier tokens would be all there is. The loss of each epoch is returned, without a unit. Reconstruction of whole
    blocks is that of BRECQ (Li et al. 2021, https://arxiv.org/abs/2102.05426).

    Of pruned weights the nonzero entries move. Of those in `rounded`, by name, levels and scales do (`_Levels`), and
    its scales become what was found.

    Few passes are the regulariser: every step is held back, and noise of the text is learned last.

    Memory: for each weight of the block 13 bytes, 19 where it is not fp32, up to 29 where it is rounded, and the
    activations of one batch.

    Raises:
        CompressError: the block's output is not finite.
    """
    movers: list[_Mover] = []
    if rounded is None:
        movers += [_Survivors(whole, parts, tuning.rate) for whole, parts in _wholes(weights)]
    else:
        assert tuning.grid is not None
        movers += [_Levels(w, rounded[w.name], tuning.grid(w.name), tuning.rate) for w in weights]
    optimizer = torch.optim.Adam([group for each in movers for group in each.groups()], betas=(0.9, 0.95), fused=True)
    total = tuning.epochs * len(calls)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARMUP) * (1 - s / total))
    order = sorted(range(len(calls)), key=lambda i: calls[i].mark)  # the text decides it, not who hands it over
    shuffle = torch.Generator().manual_seed(0)
    wholes = [whole for whole, _ in _wholes(weights)]
    losses = []
    with only_these_train(block.module, wholes):
        for _ in range(tuning.epochs):
            sum_of_losses = 0.0
            for place in torch.randperm(len(calls), generator=shuffle).tolist():
                sum_of_losses += _backward(block, calls[order[place]])
                for mover in movers:
                    mover.pull()
                for whole in wholes:
                    whole.grad = None
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for mover in movers:
                    mover.put()
            losses.append(sum_of_losses / len(calls))
    return losses


class _Mover(Protocol):
    """Parameters of the optimizer, and how they make a weight's values. A gradient that is None (experts that no token
    of the batch reached) leaves them without one."""

    def groups(self) -> list[dict[str, object]]: ...

    def pull(self) -> None:
        """The gradient of the weight's values -> that of the parameters."""

    def put(self) -> None:
        """The parameters -> the weight's values."""


class _Survivors:
    """The nonzero entries of a parameter that some of `parts` are a part of."""

    def __init__(self, whole: Tensor, parts: Sequence[Weight], rate: float) -> None:
        self._whole = whole
        self._kept = torch.zeros_like(whole, dtype=torch.bool)
        for part in parts:
            part.of(self._kept).copy_(part.matrix != 0)
        self._master = whole.detach().float()  # the same memory where it is fp32
        self._rate = rate * float((self._master.square() * self._kept).sum().div(self._kept.sum().clamp_min(1)).sqrt())

    def groups(self) -> list[dict[str, object]]:
        return [{"params": [self._master], "lr": self._rate}]

    def pull(self) -> None:
        if self._whole.grad is not None:
            self._master.grad = self._whole.grad.float().mul_(self._kept)
            self._whole.grad = None

    def put(self) -> None:
        self._whole.data.copy_(self._master)


SCALE_RATE = 0.05  # of the relative change of a scale, for each level of the rate of levels


class _Levels:
    """w = f s nearest(r): r the continuous levels, f the factors of the scales, both moved:

    dL/dr = dL/dw f s  (straight through the rounding, 0 where r is beyond the grid)      dL/df = sum dL/dw s level
    """

    def __init__(self, weight: Weight, rounded: Rounded, grid: Grid, rate: float) -> None:
        levels = grid.levels()
        self._gap = (levels[-1] - levels[0]) / (len(levels) - 1)
        self._weight, self._rounded, self._grid, self._rate = weight, rounded, grid, rate
        self._free = ~rounded.ratio.isnan()
        self._scale, self._start = rounded.scale, grid.stored(rounded.scale).float()
        self._level = codes(weight.matrix, self._start, grid)
        self._ratio = torch.where(self._free, rounded.ratio, self._level).float().contiguous()
        self._factor = torch.ones_like(self._start)

    def groups(self) -> list[dict[str, object]]:
        return [
            {"params": [self._ratio], "lr": self._rate * self._gap},
            {"params": [self._factor], "lr": self._rate * SCALE_RATE},
        ]

    def pull(self) -> None:
        whole = self._weight.whole
        if whole.grad is None:
            return
        gradient, grid = self._weight.of(whole.grad).float(), self._grid
        step = (self._start * self._factor)[..., None]
        low, high = grid.levels()[0] - self._gap / 2, grid.levels()[-1] + self._gap / 2
        inside = self._free & (self._ratio >= low) & (self._ratio <= high)
        self._ratio.grad = (
            (grid.groups(gradient) * step).flatten(1) * inside
        ).contiguous()  # fused Adam goes by memory
        self._factor.grad = (grid.groups(gradient * self._level) * self._start[..., None]).sum(-1)

    def put(self) -> None:
        self._level = self._grid.nearest(self._ratio)  # a fixed one has no gradient, and is its own ratio
        scale = (self._scale.float() * self._factor).to(self._scale.dtype)
        self._weight.matrix.copy_(from_codes(self._level, self._grid.stored(scale)))
        self._rounded.scale = scale


def _wholes(weights: Sequence[Weight]) -> list[tuple[Tensor, list[Weight]]]:
    """Parameters with the weights that are parts of each."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.parameter, []).append(weight)
    return [(parts[0].whole, parts) for parts in found.values()]


def _backward(block: Block, call: Call) -> float:
    assert call.dense is not None
    out, wanted = block.whole(call, call.hidden).float(), call.dense.float()
    error = (out - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    loss = error[call.mask].mean()
    loss.backward()
    return float(loss.detach())
