"""Hidden states: the student's layers look like the teacher's."""

import torch
from torch import Tensor

from hf_compress.losses import losses, masked_mean, same_width


@losses.register(
    "hidden_mse",
    summary="squared error of hidden states over the teacher's own mean square, at each position",
    paper="https://arxiv.org/abs/2310.06927",
    kind="hidden",
    project=True,
)
def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """mean_d (s - t)^2 / mean_d t^2 at each position, in fp32: 0 at equality, 1 for a zero student, whatever the
    scale."""
    same_width(student, teacher, loss="hidden_mse")
    student, teacher = student.float(), teacher.float()
    each = (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp_min(1e-12)
    return masked_mean(each, mask)


@losses.register(
    "squarehead",
    summary="squared error of hidden states over the teacher's mean square, both over the whole sequence",
    paper="https://arxiv.org/abs/2310.06927",
    kind="hidden",
    project=True,
)
def squarehead(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """MSE(s, t) / MSE(t, 0) within each sequence (the paper: within a batch, which accumulation would change)."""
    same_width(student, teacher, loss="squarehead")
    student, teacher = student.float(), teacher.float()
    error = masked_mean((student - teacher).square().mean(-1), mask)
    return error / masked_mean(teacher.square().mean(-1), mask).clamp_min(1e-12)


@losses.register(
    "hidden_l2",
    summary="plain mean squared error of hidden states",
    paper="https://arxiv.org/abs/1909.10351",
    kind="hidden",
    project=True,
)
def hidden_l2(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """mean_d (s - t)^2: its size is that of the teacher's hidden states, squared."""
    same_width(student, teacher, loss="hidden_l2")
    return masked_mean((student.float() - teacher.float()).square().mean(-1), mask)


@losses.register(
    "hidden_cosine",
    summary="1 - cosine of student's and teacher's hidden states",
    paper="https://arxiv.org/abs/1910.01108",
    kind="hidden",
    project=True,
)
def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - s.t / (|s| |t|) at each position: 0 for the same direction, 2 for the opposite one."""
    same_width(student, teacher, loss="hidden_cosine")
    return masked_mean(1 - torch.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)
