"""Centred kernel alignment: whether positions are arranged alike, up to rotation and scale."""

import torch
from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "cka",
    summary="1 - debiased linear CKA of a sequence's positions",
    paper="https://arxiv.org/abs/1905.00414",
    kind="hidden",
)
def cka(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - HSIC(s, t) / sqrt(HSIC(s, s) HSIC(t, t)), HSIC by the unbiased estimator of Song et al. 2012
    (https://jmlr.org/papers/v13/song12a.html): independent states give 1, where the usual estimator gives less.

    Over the masked positions of one sequence; 0 for a sequence with fewer than 4. Widths may differ.
    """
    count = mask.sum(1).double()
    ours, theirs = (_kernel(x, mask) for x in (student, teacher))
    cross = _hsic(ours, theirs, count)
    scale = (_hsic(ours, ours, count) * _hsic(theirs, theirs, count)).clamp_min(1e-24).sqrt()
    return torch.where(count >= 4, 1 - cross / scale, 0.0).float()


def _kernel(x: Tensor, mask: Tensor) -> Tensor:
    """X X^T with its diagonal and the rows and columns outside the mask zero; in fp64, since what is subtracted
    below nearly cancels."""
    x = x.double().masked_fill(~mask[..., None], 0.0)
    x = x / x.square().sum((1, 2), keepdim=True).clamp_min(1e-24).sqrt()
    k = x @ x.transpose(1, 2)
    return k * (1 - torch.eye(k.shape[1], dtype=k.dtype, device=k.device))


def _hsic(a: Tensor, b: Tensor, count: Tensor) -> Tensor:
    n = count.clamp_min(4)
    product = (a * b).sum((1, 2))
    sums = a.sum((1, 2)) * b.sum((1, 2)) / ((n - 1) * (n - 2))
    rows = (a.sum(2) * b.sum(2)).sum(1) * 2 / (n - 2)
    return (product + sums - rows) / (n * (n - 3))
