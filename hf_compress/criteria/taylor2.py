"""Keep the weights whose removal would change the loss most, to second order."""

from torch import Tensor

from hf_compress.criteria import Statistics, criteria


@criteria.register(
    "taylor2",
    summary="W^2 * F / 2, F the Fisher diagonal: optimal brain damage",
    paper="https://arxiv.org/abs/1801.05787",
    needs=("fisher",),
    group="layer",
)
def taylor2(weight: Tensor, statistics: Statistics) -> Tensor:
    """W_ij^2 F_ij / 2, (out, in), F the mean squared gradient: the rise of the loss at a minimum, where g is 0.

    LeCun et al. 1989 (optimal brain damage) with the diagonal of the empirical Fisher matrix for the Hessian's, as
    Theis et al. 2018.
    """
    assert statistics.fisher is not None
    return weight.float().square() * statistics.fisher / 2
