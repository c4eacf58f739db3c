"""Outputs as numbers, for regression heads (and logits, where that is wanted)."""

from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "mse",
    summary="mean squared difference of the outputs themselves; the loss of regression heads",
    paper="https://arxiv.org/abs/2105.08919",
    kind="values",
)
def mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """mean_v (s_v - t_v)^2; slope 2 (s - t) / outputs. Temperature plays no part."""
    difference = student - teacher
    return difference.square().mean(-1), difference * (2 / difference.shape[-1])
