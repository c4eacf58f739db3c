"""Generalized Jensen-Shannon divergence: both distributions against their mixture."""

import math

import torch
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses
from hf_compress.losses.forward_kl import forward_kl
from hf_compress.losses.reverse_kl import reverse_kl


@losses.register(
    "jsd",
    summary="beta KL(teacher || mixture) + (1 - beta) KL(student || mixture); TRL's beta",
    paper="https://arxiv.org/abs/2306.13649",
    kind="logits",
    order=2,
    options=("beta",),
)
def jsd(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; slope (1 - beta) q (log q - log m).

    As in TRL, beta = 0 is forward KL and beta = 1 reverse KL, although the formula falls to 0 there: `jsd_normalized`
    has no such jump. log m is a log-sum-exp of log-probabilities, so it is finite wherever they are.
    """
    if not 0 <= beta <= 1:
        raise CompressError(f"beta {beta} is not between 0 and 1", where="distill.beta")
    if beta in (0, 1):
        end: tuple[Tensor, Tensor] = (reverse_kl if beta else forward_kl)(log_q, log_p)
        return end
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p, q = log_p.exp(), log_q.exp()
    from_student = q * (log_q - log_m)
    value = beta * torch.linalg.vecdot(p, log_p - log_m) + (1 - beta) * from_student.sum(-1)
    return value, (1 - beta) * from_student


@losses.register(
    "jsd_normalized",
    summary="jsd / (beta (1 - beta)): forward KL at beta = 0, reverse KL at beta = 1, continuous between",
    paper="https://arxiv.org/abs/2306.13649",
    kind="logits",
    order=2,
    options=("beta",),
)
def jsd_normalized(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """J_beta / (beta (1 - beta)); its limits at 0 and 1 are the two KLs, which it is there."""
    value, slope = jsd(log_q, log_p, beta=beta)
    scale = beta * (1 - beta) or 1.0
    return value / scale, slope / scale
