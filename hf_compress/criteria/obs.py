"""Keep the weights that the others in their row cannot stand in for."""

import torch
from torch import Tensor

from hf_compress.criteria import Statistics, criteria

DAMPING = 0.01  # of the mean diagonal


@criteria.register(
    "obs",
    summary="W_ij^2 / [H^-1]_jj: optimal brain surgeon, what a row loses after the others adapt",
    paper="https://arxiv.org/abs/2301.00774",
    needs=("hessian",),
    group="row",
)
def obs(weight: Tensor, statistics: Statistics) -> Tensor:
    """W_ij^2 / [H^-1]_jj, (out, in): the layer's squared error once W_ij is gone and the rest of its row refitted.

    Hassibi and Stork 1993, as in SparseGPT (Frantar and Alistarh 2023). H is damped by 1% of its mean diagonal;
    weights of an input that is always 0 score 0.
    """
    assert statistics.hessian is not None
    diagonal = statistics.hessian.diagonal()
    dead = diagonal == 0
    damped = statistics.hessian + torch.diag(dead.float() + DAMPING * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return (weight.float().square() / inverse.diagonal()).masked_fill(dead, 0)
