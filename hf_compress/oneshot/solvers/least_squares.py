"""Choose a mask by a criterion, then give the surviving weights their best values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hf_compress.criteria import ONESHOT, Statistics, criteria, usable
from hf_compress.oneshot.amount import Amount
from hf_compress.oneshot.least_squares import conjugate_gradients
from hf_compress.oneshot.problem import held_out_target, problem
from hf_compress.oneshot.solvers import CALIBRATED, DENSE_TARGET, Solved, Solver, scored, solvers
from hf_compress.weights import Weight


@solvers.register(
    "least_squares",
    summary="a criterion's mask, least-squares weights on it, toward the dense model's outputs",
    paper="https://arxiv.org/abs/2510.14444",
    makes="zeros",
    takes_criterion=True,
)
def by_least_squares(
    *,
    criterion: str = "wanda",
    sparsity: float,
    pattern: str = "unstructured",
    group: str | None = None,
    sparsities: Mapping[str, float] | None = None,
    gradients: Mapping[str, Statistics] | None = None,
    dense_target: bool = True,
    steps: int = 20,
) -> Solver:
    """The mask as the solver ``criterion``, the values by `conjugate_gradients` toward `held_out_target`.

    Args:
        gradients: weight name -> Statistics with gradient and fisher, for the criteria that need them.

    Raises:
        CompressError: unknown criterion, or one that only training can serve; as `Amount`.
    """
    usable(criterion, ONESHOT, during="one-shot pruning", where="criterion")
    entry = criteria.entry(criterion)
    amount = Amount(sparsity, pattern, group or entry.traits["group"], sparsities or {})

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        matrix = torch.cat([weight.matrix for weight in weights])
        given = problem(matrix, statistics, held_out_target(matrix, statistics, follow=dense_target))
        mask = torch.cat([amount.mask(scored(entry.value, w, statistics, gradients), w.name) for w in weights])
        statistics.let_go()
        values = conjugate_gradients(given, mask, matrix.float() * given.norm * mask, steps=steps)
        return [Solved(part) for part in given.unscaled(values).split([weight.shape[0] for weight in weights])]

    calibrated = [need for need in entry.traits["needs"] if need in CALIBRATED]
    needs = tuple(sorted({"hessian", *calibrated, *(DENSE_TARGET if dense_target else ())}))
    options = {"solver": "least_squares", "criterion": criterion, "dense_target": dense_target, "steps": steps}
    return Solver(solve, needs, staged=True, refits=True, options=options | amount.facts())
