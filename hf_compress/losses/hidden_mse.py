"""Hidden states: the student's layers look like the teacher's."""

from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "hidden_mse",
    summary="squared error of hidden states over the teacher's own mean square",
    paper="https://arxiv.org/abs/2310.06927",
    kind="hidden",
)
def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_d (s - t)^2 / mean_d t^2 at each position, in fp32: 0 at equality, 1 for a zero student, whatever the
    scale.

    (positions, width) twice -> (positions,). SquareHead divides by the mean over the whole batch; dividing at each
    position keeps the term a sum over positions, so gradient accumulation does not change it.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp_min(1e-12)
