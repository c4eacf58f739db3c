"""Hidden states: the student's layers look like the teacher's."""

from torch import Tensor

from hf_compress.losses import losses


@losses.register("hidden_mse", summary="squared error of hidden states over the teacher's own mean square", paper="https://arxiv.org/abs/2310.06927",
                 kind="hidden")
def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_d (s - t)^2 / mean over positions and d of t^2, in fp32: 0 at equality, 1 on average for a zero student.

    (positions, width) twice -> (positions,).
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().mean(-1) / teacher.square().mean().clamp_min(1e-12)
