"""How many weights of each matrix a solver keeps, and where it may keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from hf_compress.errors import CompressError, at
from hf_compress.patterns import check_fits, check_target, mask_of

SAMPLE = 1 << 16  # scores that a rough threshold is read from


@dataclass(frozen=True)
class Amount:
    """``Amount(0.5, "2:4")``.

    Args:
        sparsity: share of each matrix to drop. pattern, group: as `mask_of`.
        own: weight name -> its own sparsity, where it differs.

    Raises:
        CompressError: a sparsity outside [0, 1); N:M with another sparsity than its own; a group that would need the
        whole model at once.
    """

    sparsity: float
    pattern: str = "unstructured"
    group: str = "layer"
    own: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for sparsity in {self.sparsity, *self.own.values()}:
            check_target(sparsity, self.pattern)
        if self.group not in ("row", "layer"):
            raise CompressError(
                f"one-shot pruning goes block by block and cannot compare by {self.group!r}",
                where="group",
                next_step="row or layer; for a global threshold prune while training",
            )

    def of(self, name: str) -> float:
        return self.own.get(name, self.sparsity)

    def check(self, shape: tuple[int, int], name: str) -> None:
        """Raise a CompressError, at the weight, unless the pattern's sizes divide its (out, in)."""
        check_fits(shape, self.pattern, where=name)

    def mask(self, scores: Tensor, name: str) -> Tensor:
        """(out, in) scores -> bool, True = kept; exact counts.

        Raises:
            CompressError: as `mask_of`, at the weight.
        """
        with at(name):
            return mask_of(scores, sparsity=self.of(name), pattern=self.pattern, group=self.group)

    def rough_mask(self, scores: Tensor, name: str) -> Tensor:
        """As `mask`, but of a large matrix compared as a whole the threshold is read from a sample of its scores: for
        the steps of a solver that asks for many masks and keeps the last."""
        stride = scores.numel() // SAMPLE
        if stride < 2 or self.pattern != "unstructured" or self.group != "layer":
            return self.mask(scores, name)
        while math.gcd(stride, scores.shape[1]) > 1:  # so that it runs through the columns
            stride += 1
        sample = scores.flatten()[::stride]
        drop = round(self.of(name) * len(sample))
        return scores > sample.kthvalue(drop).values if drop else scores >= 0

    def facts(self) -> dict[str, Any]:
        return asdict(self)
