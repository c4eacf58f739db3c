"""MiniLM-v2: how positions relate through queries, keys and values, with no need of equal heads or widths."""

from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses, masked_mean


@losses.register(
    "relations",
    summary="KL of softmax(A A^T / sqrt d) for A = queries, keys, values, split anew into relation_heads",
    paper="https://arxiv.org/abs/2012.15828",
    kind="qkv",
    options=("relation_heads",),
)
def relations(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor, *, relation_heads: int = 4
) -> Tensor:
    """Mean over queries, keys and values (each (batch, positions, width)), heads and positions of KL(teacher ||
    student) between rows of softmax(A A^T / sqrt d), over pairs of positions that are both in `mask`.

    Before rotary embedding. Of latent attention (MLA): the expanded queries, the unrotated part of the expanded keys,
    and the values.

    Raises:
        CompressError: a width that relation_heads does not divide.
    """
    total = mask.new_zeros(len(mask), dtype=student[0].dtype).float()
    for ours, theirs in zip(student, teacher, strict=True):
        log_q, log_p = (_log_relation(a, mask, relation_heads) for a in (ours, theirs))
        each = (log_p.exp() * (log_p - log_q)).masked_fill(~mask[:, None, None], 0.0)
        total = total + masked_mean(each.sum(-1).mean(1), mask)
    return total / len(student)


def _log_relation(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(batch, positions, width) -> (batch, heads, positions, positions)."""
    width = states.shape[-1]
    if width % heads:
        raise CompressError(
            f"a width of {width} is not divided by {heads} relation heads",
            where="distill.features.relations.relation_heads",
            next_step="take a number that divides the widths of queries, keys and values of student and teacher",
        )
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    found: Tensor = scores.masked_fill(~mask[:, None, None], -1e9).log_softmax(-1)
    return found
