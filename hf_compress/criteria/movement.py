"""Keep the weights that training moves away from zero."""

from torch import Tensor

from hf_compress.criteria import Statistics, criteria


@criteria.register(
    "movement",
    summary="accumulated -g * W over training steps: weights that move away from zero stay",
    paper="https://arxiv.org/abs/2005.07683",
    needs=("movement",),
    group="layer",
)
def movement(weight: Tensor, statistics: Statistics) -> Tensor:
    """Sum over steps of -g_ij W_ij, (out, in): positive where the steps make |W_ij| larger.

    Sanh et al. 2020, without the scores' own learning rate, which changes no order. Training only.
    """
    assert statistics.movement is not None
    return statistics.movement
