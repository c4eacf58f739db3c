"""KL against a little of the other distribution: bounded, so early training is calm."""

import math

import torch
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses


@losses.register(
    "skew_kl",
    summary="KL(teacher || alpha teacher + (1 - alpha) student)",
    paper="https://arxiv.org/abs/2402.03898",
    kind="logits",
    order=2,
    options=("alpha",),
)
def skew_kl(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(p || m), m = alpha p + (1 - alpha) q: KL(p || q) at alpha = 0, never above -log alpha; slope
    -(1 - alpha) p q / m."""
    log_m = _mixture(log_p, log_q, alpha)
    value = torch.linalg.vecdot(log_p.exp(), log_p - log_m)
    return value, -(1 - alpha) * (log_p + log_q - log_m).exp()


@losses.register(
    "skew_reverse_kl",
    summary="KL(student || alpha student + (1 - alpha) teacher)",
    paper="https://arxiv.org/abs/2402.03898",
    kind="logits",
    order=2,
    options=("alpha",),
)
def skew_reverse_kl(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(q || m), m = alpha q + (1 - alpha) p; slope q (log q - log m + 1) - alpha q^2 / m."""
    log_m = _mixture(log_q, log_p, alpha)
    q, ratio = log_q.exp(), log_q - log_m
    return torch.linalg.vecdot(q, ratio), q * (ratio + 1) - alpha * (2 * log_q - log_m).exp()


def _mixture(mine: Tensor, other: Tensor, alpha: float) -> Tensor:
    """log(alpha exp(mine) + (1 - alpha) exp(other))."""
    if not 0 <= alpha < 1:
        raise CompressError(f"alpha {alpha} is not in [0, 1)", where="distill.alpha")
    return torch.logaddexp(mine + math.log(alpha), other + math.log1p(-alpha)) if alpha else other
