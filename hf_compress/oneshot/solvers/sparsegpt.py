"""SparseGPT: prune column by column, the columns to the right making up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.oneshot.amount import Amount
from hf_compress.oneshot.obs import COLUMNS, obs_prune
from hf_compress.oneshot.problem import Target, held_out_target, problem
from hf_compress.oneshot.solvers import DENSE_TARGET, Solved, Solver, solvers
from hf_compress.patterns import NM, mask_of, parse_pattern
from hf_compress.weights import Weight

DAMPING = 0.01


@solvers.register(
    "sparsegpt",
    summary="column by column, the columns to the right make up for what is dropped",
    paper="https://arxiv.org/abs/2301.00774",
    makes="zeros",
)
def sparsegpt(
    *,
    sparsity: float,
    pattern: str = "unstructured",
    group: str | None = None,
    sparsities: Mapping[str, float] | None = None,
    dense_target: bool = False,
) -> Solver:
    """`obs_prune`, with exact counts: unstructured weights compete within blocks of 128 columns (``layer``) or of one
    row of them (``row``).

    Args:
        dense_target: start from the target of `held_out_target` instead of the weights themselves.

    Raises:
        CompressError: as `Amount`; a pattern of blocks; M that does not divide 128 or the inputs.
    """
    amount = Amount(sparsity, pattern, group or "layer", sparsities or {})
    parsed = parse_pattern(pattern)
    if parsed is not None and not (isinstance(parsed, NM) and COLUMNS % parsed.of == 0):
        raise CompressError(
            f"the solver 'sparsegpt' has no pattern {pattern}",
            where="pattern",
            next_step="unstructured, 2:4 or another N:M whose M divides 128, or the solver 'alps'",
        )

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        return [Solved(_one(weight, statistics)) for weight in weights]

    def _one(weight: Weight, statistics: Statistics) -> Tensor:
        amount.check(weight.shape, weight.name)
        assert statistics.hessian is not None
        matrix = weight.matrix.float()
        target = held_out_target(matrix, statistics) if dense_target else Target(damping=DAMPING)
        given = problem(matrix, statistics, target)
        start = given.unmasked() if dense_target else matrix * given.norm
        dead = statistics.hessian.diagonal() == 0
        start = start.masked_fill(dead, 0)  # an input that is always zero can go first
        counted = _Counted(weight, amount)
        values, _ = obs_prune(start, given.gram, counted.choose, every=parsed.of if parsed else COLUMNS)
        return given.unscaled(values)

    needs = ("hessian", *(DENSE_TARGET if dense_target else ()))
    options = {"solver": "sparsegpt", "dense_target": dense_target}
    return Solver(solve, needs, staged=True, refits=True, options=options | amount.facts())


class _Counted:
    """Masks of one column block after another that come to the exact count of the whole matrix (of each row)."""

    def __init__(self, weight: Weight, amount: Amount) -> None:
        self.amount, self.name, self.dropped = amount, weight.name, 0
        self.rows = weight.shape[0] if amount.group == "layer" else 1

    def choose(self, scores: Tensor, first: int) -> Tensor:
        if self.amount.pattern != "unstructured":
            return self.amount.mask(scores, self.name)
        upto = round(self.amount.of(self.name) * self.rows * (first + scores.shape[1]))
        here = min(upto - self.dropped, self.rows * scores.shape[1] - 1)  # a narrow last block keeps at least one
        self.dropped += here
        return mask_of(scores, sparsity=here / (self.rows * scores.shape[1]), group=self.amount.group)
