"""Attention maps: the student looks where the teacher looks. Needs as many heads."""

from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses, masked_mean


@losses.register(
    "attention_kl",
    summary="KL(teacher || student) of attention maps, mean over heads",
    paper="https://arxiv.org/abs/2002.10957",
    kind="attention",
)
def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """sum_k t_k (log t_k - log s_k) of each query at `mask`; keys that the model itself masks count nothing."""
    _same_heads(student, teacher, "attention_kl")
    student, teacher = student.float(), teacher.float()
    tiny = 1e-12  # masked keys hold exact zeros
    each = teacher * (teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log())
    return masked_mean(each.sum(-1).mean(1), mask)


@losses.register(
    "attention_mse",
    summary="squared error of attention maps, summed over keys, mean over heads",
    paper="https://arxiv.org/abs/1909.10351",
    kind="attention",
)
def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """sum_k (s_k - t_k)^2 of each query at `mask`, so that longer padding changes nothing."""
    _same_heads(student, teacher, "attention_mse")
    return masked_mean((student.float() - teacher.float()).square().sum(-1).mean(1), mask)


def _same_heads(student: Tensor, teacher: Tensor, loss: str) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise CompressError(
            f"the student has {student.shape[1]} attention heads, the teacher {teacher.shape[1]}",
            where=f"distill.features.{loss}",
            next_step="take `relations`, which splits queries, keys and values anew",
        )
