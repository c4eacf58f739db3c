"""Half the sum of absolute differences: the share of probability that sits at the wrong classes."""

from torch import Tensor

from hf_compress.losses import losses


@losses.register(
    "total_variation",
    summary="sum |teacher - student| / 2, between 0 and 1",
    paper="https://arxiv.org/abs/2307.15190",
    kind="logits",
    order=1,
)
def total_variation(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v |q_v - p_v| / 2; slope q sign(q - p) / 2."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs().sum(-1) / 2, q * difference.sign_() / 2
