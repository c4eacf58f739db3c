"""Let the weights a block has left move together, toward what the dense block answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.oneshot.calls import Block, Call
from hf_compress.oneshot.gradients import only_these_train
from hf_compress.weights import Weight

WARMUP = 4  # steps


@dataclass(frozen=True)
class Tuning:
    """epochs: passes over the calibration text. rate: of Adam, in units of the root mean square of the weights that
    are left of a matrix, falling linearly to 0."""

    epochs: int = 2
    rate: float = 0.01


def tune(block: Block, calls: list[Call], weights: Sequence[Weight], tuning: Tuning) -> list[float]:
    """Minimise over the nonzero entries of `weights`, in place, by Adam, a batch a step:

        mean over tokens of ||block(x) - d||^2 / ||d||^2

    x what the compressed model hands to the block, d the dense model's output of it (`Call.dense`), both (batch,
    tokens, hidden). Solvers see one matrix at a time and no nonlinearity; here they make up for each other. A token
    counts by its relative error, as the norm of whatever reads the stream next will see it: in absolute size a few
    outlier tokens would be all there is. The loss of each epoch is returned, without a unit. Reconstruction of whole
    blocks is that of BRECQ (Li et al. 2021, https://arxiv.org/abs/2102.05426), there for rounding.

    Few passes are the regulariser: every step is held back, and noise of the text is learned last.

    Memory: for each weight of the block 12 bytes, 16 where it is not fp32, and the activations of one batch.

    Raises:
        CompressError: the block's output is not finite.
    """
    found = {weight.parameter: weight.whole for weight in weights}
    kept = _nonzero(weights)
    masters = {name: whole.detach().float() for name, whole in found.items()}  # the same memory where it is fp32
    groups = [{"params": [master], "lr": tuning.rate * _rms(master, kept[name])} for name, master in masters.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    total = tuning.epochs * len(calls)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARMUP) * (1 - s / total))
    order = sorted(range(len(calls)), key=lambda i: calls[i].mark)  # the text decides it, not who hands it over
    shuffle = torch.Generator().manual_seed(0)
    losses = []
    with only_these_train(block.module, found.values()):
        for _ in range(tuning.epochs):
            sum_of_losses = 0.0
            for place in torch.randperm(len(calls), generator=shuffle).tolist():
                sum_of_losses += _backward(block, calls[order[place]])
                for name, whole in found.items():
                    if whole.grad is not None:  # experts that no token of this batch reached
                        masters[name].grad = whole.grad.float().mul_(kept[name])
                        whole.grad = None
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for name, whole in found.items():
                    whole.data.copy_(masters[name])
            losses.append(sum_of_losses / len(calls))
    return losses


def _nonzero(weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Parameter -> bool of its shape, True = an entry of one of `weights` that is not zero."""
    kept: dict[str, Tensor] = {}
    for weight in weights:
        whole = kept.setdefault(weight.parameter, torch.zeros_like(weight.whole, dtype=torch.bool))
        weight.of(whole).copy_(weight.matrix != 0)
    return kept


def _rms(values: Tensor, kept: Tensor) -> float:
    return float((values.square().sum() / kept.sum().clamp_min(1)).sqrt())


def _backward(block: Block, call: Call) -> float:
    assert call.dense is not None
    out, wanted = block.whole(call, call.hidden).float(), call.dense.float()
    error = (out - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    loss = error[call.mask].mean()
    loss.backward()
    return float(loss.detach())
