"""The student stays where the teacher is: mass that the teacher does not have costs most."""

import torch
from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "reverse_kl",
    summary="KL(student || teacher)",
    paper="https://arxiv.org/abs/2306.08543",
    kind="logits",
    order=2,
)
def reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v q_v (log q_v - log p_v); slope q (log q - log p + 1)."""
    q, ratio = log_q.exp(), log_q - log_p
    return torch.linalg.vecdot(q, ratio), q * ratio.add_(1)
