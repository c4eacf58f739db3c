"""Keep the weights whose product with the inputs they see is largest."""

from torch import Tensor

from hf_compress.criteria import Statistics, criteria


@criteria.register(
    "wanda",
    summary="|W_ij| * ||X_j||: compared within each output row",
    paper="https://arxiv.org/abs/2306.11695",
    needs=("input_norm",),
    group="row",
)
def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """|W_ij| * ||X_j||_2, (out, in); `statistics.input_norm` is (in,)."""
    assert statistics.input_norm is not None
    return weight.abs().float() * statistics.input_norm
