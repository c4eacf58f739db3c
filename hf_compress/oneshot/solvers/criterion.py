"""Zero the weights that matter least, leave the rest as they are."""

from __future__ import annotations

from hf_compress.criteria import Statistics, criteria
from hf_compress.errors import CompressError
from hf_compress.oneshot.solvers import Solved, Solver, solvers
from hf_compress.patterns import mask_of
from hf_compress.weights import Weight


@solvers.register(
    "criterion",
    summary="zero the lowest-scored weights, leave the rest as they are",
    paper="https://arxiv.org/abs/2306.11695",
    makes="zeros",
)
def by_criterion(*, criterion: str, sparsity: float, pattern: str = "unstructured") -> Solver:
    """Wanda compares scores within each output row, magnitude within each matrix; N:M within each group of M inputs.

    Raises:
        CompressError: unknown criterion; while solving: M does not divide the inputs, scores that are not finite.
    """
    entry = criteria.entry(criterion)

    def solve(weight: Weight, statistics: Statistics) -> Solved:
        scores = entry.value(weight.matrix, statistics)
        try:
            mask = mask_of(scores, sparsity=sparsity, pattern=pattern, group=entry.traits["group"])
        except CompressError as error:
            raise CompressError(error.what, where=weight.name, next_step=error.next_step) from error
        return Solved(weight.matrix * mask)

    return Solver(solve, entry.traits["needs"], {"criterion": criterion, "sparsity": sparsity, "pattern": pattern})
