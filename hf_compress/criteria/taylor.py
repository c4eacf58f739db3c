"""Keep the weights whose removal would change the loss most, to first order."""

from torch import Tensor

from hf_compress.criteria import Statistics, criteria


@criteria.register(
    "taylor",
    summary="|g * W|: first-order Taylor, the change of the loss when a weight goes",
    paper="https://arxiv.org/abs/1906.10771",
    needs=("gradient",),
    group="layer",
)
def taylor(weight: Tensor, statistics: Statistics) -> Tensor:
    """|g_ij W_ij|, (out, in), g the mean gradient: loss(W) - loss(W with W_ij = 0) to first order.

    Molchanov et al. 2019 rank by its square, which is the same order without fp32's underflow.
    """
    assert statistics.gradient is not None
    return (statistics.gradient * weight.float()).abs()
