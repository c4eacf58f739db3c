"""Relational distillation: distances and angles between the positions of one sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "rkd_distance",
    summary="Huber loss of distances between positions of a sequence, over their mean",
    paper="https://arxiv.org/abs/1904.05068",
    kind="hidden",
    options=("positions",),
)
def rkd_distance(student: Tensor, teacher: Tensor, mask: Tensor, *, positions: int = 64) -> Tensor:
    """|x_i - x_j| / mean |x_i - x_j| of student against teacher, mean over pairs. Widths may differ; rotation and
    scale change nothing.

    The paper compares the examples of a batch, which accumulation would change; here up to `positions` evenly spaced
    positions of each sequence are compared with one another, so the loss sees one sequence at a time.
    """
    (ours, theirs), valid = _spaced((student, teacher), mask, positions)
    pairs = _pairs(valid)

    def distances(x: Tensor) -> Tensor:
        x = x - _centre(x, valid)  # by inner products, which lose digits far from the origin
        products = x @ x.transpose(1, 2)
        length = products.diagonal(dim1=1, dim2=2)
        squares = length[:, :, None] + length[:, None] - 2 * products
        found = squares.clamp_min(1e-12).sqrt().masked_fill(~pairs, 0.0)
        mean = found.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
        return found / mean.clamp_min(1e-12)[:, None, None]

    return _mean(F.smooth_l1_loss(distances(ours), distances(theirs), reduction="none"), pairs)


@losses.register(
    "rkd_angle",
    summary="Huber loss of cosines of angles between positions of a sequence",
    paper="https://arxiv.org/abs/1904.05068",
    kind="hidden",
    options=("positions",),
)
def rkd_angle(student: Tensor, teacher: Tensor, mask: Tensor, *, positions: int = 24) -> Tensor:
    """cos of the angle at j between i and k, mean over triples of up to `positions` evenly spaced positions."""
    (ours, theirs), valid = _spaced((student, teacher), mask, positions)
    pairs = _pairs(valid)
    triples = pairs[:, :, :, None] & pairs[:, :, None, :] & pairs[:, None]  # the vertex j, and two others

    def angles(x: Tensor) -> Tensor:
        edges = F.normalize((x[:, None] - x[:, :, None]).masked_fill(~pairs[..., None], 0.0), dim=-1, eps=1e-6)
        return edges @ edges.transpose(-1, -2)

    return _mean(F.smooth_l1_loss(angles(ours), angles(theirs), reduction="none"), triples)


def _pairs(valid: Tensor) -> Tensor:
    """(batch, positions) -> (batch, positions, positions): two different positions that both exist."""
    return valid[:, :, None] & valid[:, None] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)


def _centre(x: Tensor, valid: Tensor) -> Tensor:
    total = x.masked_fill(~valid[..., None], 0.0).sum(1, keepdim=True)
    return total / valid.sum(1).clamp_min(1)[:, None, None]


def _mean(each: Tensor, where: Tensor) -> Tensor:
    dims = tuple(range(1, each.dim()))
    return each.masked_fill(~where, 0.0).sum(dims) / where.sum(dims).clamp_min(1)


def _spaced(states: tuple[Tensor, ...], mask: Tensor, most: int) -> tuple[list[Tensor], Tensor]:
    """The masked positions of each sequence, moved to the front and thinned evenly to `most`; which of them exist."""
    most = min(most, mask.shape[1])
    count = mask.sum(1, keepdim=True)
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    slot = torch.arange(most, device=mask.device).expand(len(mask), -1)
    chosen = order.gather(1, torch.where(count > most, slot * count // most, slot))
    found = [s.float().gather(1, chosen[..., None].expand(-1, -1, s.shape[-1])) for s in states]
    return found, slot < count
