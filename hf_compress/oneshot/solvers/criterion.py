"""Zero the weights that matter least, leave the rest as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_compress.criteria import ONESHOT, Statistics, criteria, usable
from hf_compress.oneshot.amount import Amount
from hf_compress.oneshot.solvers import CALIBRATED, Solved, Solver, scored, solvers
from hf_compress.weights import Weight


@solvers.register(
    "criterion",
    summary="zero the lowest-scored weights, leave the rest as they are",
    paper="https://arxiv.org/abs/2306.11695",
    makes="zeros",
    takes_criterion=True,
)
def by_criterion(
    *,
    criterion: str = "wanda",
    sparsity: float,
    pattern: str = "unstructured",
    group: str | None = None,
    sparsities: Mapping[str, float] | None = None,
    gradients: Mapping[str, Statistics] | None = None,
) -> Solver:
    """Unless `group` says otherwise Wanda compares scores within each output row, magnitude within each matrix.

    Args:
        sparsities: weight name -> its own sparsity. gradients: weight name -> Statistics with gradient and fisher, for
        the criteria that need them.

    Raises:
        CompressError: unknown criterion, or one that only training can serve; as `Amount`.
    """
    usable(criterion, ONESHOT, during="one-shot pruning", where="criterion")
    entry = criteria.entry(criterion)
    amount = Amount(sparsity, pattern, group or entry.traits["group"], sparsities or {})

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        masks = (amount.mask(scored(entry.value, w, statistics, gradients), w.name) for w in weights)
        return [Solved(weight.matrix * mask) for weight, mask in zip(weights, masks, strict=True)]

    calibrated = tuple(need for need in entry.traits["needs"] if need in CALIBRATED)
    return Solver(solve, calibrated, "hessian" in calibrated, options={"criterion": criterion} | amount.facts())
