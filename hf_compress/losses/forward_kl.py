"""Soft targets: the student covers everything the teacher finds likely."""

import torch
from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "forward_kl",
    summary="KL(teacher || student)",
    paper="https://arxiv.org/abs/1503.02531",
    kind="logits",
    order=2,
)
def forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v p_v (log p_v - log q_v); slope -p. Times T^2, its gradient with respect to the logits is T (q - p)."""
    p = log_p.exp()
    return torch.linalg.vecdot(p, log_p - log_q), p.neg_()
