"""Soft targets: the student covers everything the teacher finds likely."""

import torch.nn.functional as F
from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "forward_kl",
    summary="T^2 KL(teacher || student) at temperature T",
    paper="https://arxiv.org/abs/1503.02531",
    kind="logits",
)
def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 * sum_v p_v (log p_v - log q_v), p = softmax(teacher / T), q = softmax(student / T), in fp32.

    (positions, vocab) twice -> (positions,). Its gradient with respect to the student's logits is T (q - p).
    """
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
