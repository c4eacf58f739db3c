"""Choose the mask and the surviving weights together, toward the dense model's outputs: the best, and the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_compress.criteria import Statistics
from hf_compress.oneshot.admm import admm
from hf_compress.oneshot.amount import Amount
from hf_compress.oneshot.least_squares import conjugate_gradients
from hf_compress.oneshot.problem import held_out_target, problem
from hf_compress.oneshot.solvers import DENSE_TARGET, Solved, Solver, solvers
from hf_compress.oneshot.tuning import Tuning
from hf_compress.weights import Weight


@solvers.register(
    "alps",
    summary="ADMM mask, least-squares weights, toward the dense model's outputs",
    paper="https://arxiv.org/abs/2406.07831",
    makes="zeros",
)
def alps(
    *,
    sparsity: float,
    pattern: str = "unstructured",
    group: str | None = None,
    sparsities: Mapping[str, float] | None = None,
    dense_target: bool = True,
    iterations: int = 12,
    steps: int = 8,
    epochs: int = 1,
) -> Solver:
    """`admm` for the mask, `conjugate_gradients` for the values on it, the target of `held_out_target`; then `tune`.

    Args:
        group: ``layer`` (the default: weights of a matrix compete) or ``row``. sparsities: weight name -> its own.
        dense_target: aim at the dense model's outputs; False keeps each matrix's own. iterations: of ADMM. steps: of
        conjugate gradients. epochs: passes over the text in which a block's survivors are tuned together; 0 for none
        (a block then takes no optimizer state: memory).

    Raises:
        CompressError: as `Amount`; while solving: sizes that do not divide.
    """
    amount = Amount(sparsity, pattern, group or "layer", sparsities or {})

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        matrix = torch.cat([weight.matrix for weight in weights])
        heights = [weight.shape[0] for weight in weights]
        given = problem(matrix, statistics, held_out_target(matrix, statistics, follow=dense_target))
        statistics.let_go()

        def each(choose: Callable[[Tensor, str], Tensor], scores: Tensor) -> Tensor:
            parts = zip(scores.split(heights), weights, strict=True)
            return torch.cat([choose(part, weight.name) for part, weight in parts])

        found = admm(given, matrix.float() * given.norm, lambda s: each(amount.rough_mask, s), iterations=iterations)
        mask = each(amount.mask, found.abs())
        values = conjugate_gradients(given, mask, found * mask, steps=steps)
        return [Solved(part) for part in given.unscaled(values).split(heights)]

    needs = ("hessian", *(DENSE_TARGET if dense_target else ()))
    options = {"solver": "alps", "dense_target": dense_target, "iterations": iterations, "steps": steps}
    options |= {"epochs": epochs} | amount.facts()
    tuning = Tuning(epochs) if epochs else None
    return Solver(solve, needs, staged=True, refits=True, tuning=tuning, options=options)
