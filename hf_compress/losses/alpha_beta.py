"""Alpha-beta divergence: two exponents say how much a wrong confidence and a missed one each cost."""

import torch
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses


@losses.register(
    "alpha_beta",
    summary="alpha-beta divergence: forward KL near (1, 0), reverse KL near (0, 1), squared Hellinger at (0.5, 0.5)",
    paper="https://arxiv.org/abs/2505.04560",
    kind="logits",
    order=2,
    options=("alpha", "beta"),
)
def alpha_beta(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.1, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """-1 / (a b) sum_v (p^a q^b - a / (a + b) p^(a+b) - b / (a + b) q^(a+b)), its limits where a or b is 0; slope
    (q^(a+b) - p^a q^b) / a. Exponents of at least 0, not both 0: powers stay finite where probabilities underflow."""
    if min(alpha, beta) < 0 or alpha + beta == 0:
        raise CompressError(
            f"alpha {alpha}, beta {beta}: neither may be negative, nor both 0", where="distill.alpha, distill.beta"
        )
    total = alpha + beta
    p, q, cross = (total * log_p).exp(), (total * log_q).exp(), (alpha * log_p + beta * log_q).exp()
    if alpha == 0:
        slope = q * (log_q - log_p)
        return (slope / beta - (q - p) / beta**2).sum(-1), slope
    if beta == 0:
        return (torch.mul(p, log_p - log_q) / alpha - (p - q) / alpha**2).sum(-1), (q - p) / alpha
    value = (p / (beta * total) + q / (alpha * total) - cross / (alpha * beta)).sum(-1)
    return value, (q - cross) / alpha
