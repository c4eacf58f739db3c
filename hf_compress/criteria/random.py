"""Keep weights by lot."""

import torch
from torch import Tensor

from hf_compress.criteria import Statistics, criteria


@criteria.register(
    "random",
    summary="uniform random numbers: the control that a criterion must beat",
    paper="",
    needs=(),
    group="layer",
)
def random(weight: Tensor, statistics: Statistics) -> Tensor:
    """Uniform in [0, 1), (out, in), drawn on the CPU from `statistics.seed`: the same at every call."""
    drawn = torch.Generator().manual_seed(statistics.seed)
    return torch.rand(weight.shape, generator=drawn).to(weight.device)
