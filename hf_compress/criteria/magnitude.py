"""Keep the largest weights."""

from torch import Tensor

from hf_compress.criteria import Statistics, criteria


@criteria.register(
    "magnitude",
    summary="|W|: free, the control of every comparison",
    paper="https://arxiv.org/abs/1506.02626",
    needs=(),
    group="layer",
)
def magnitude(weight: Tensor, statistics: Statistics) -> Tensor:
    """|W|, (out, in)."""
    return weight.abs().float()
