"""Round with feedback, toward the dense model's outputs: scales and levels are chosen together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_compress.criteria import Statistics
from hf_compress.errors import at
from hf_compress.grids import Grid, from_codes, pinned, scales, searched_scales
from hf_compress.oneshot.least_squares import conjugate_gradients
from hf_compress.oneshot.problem import Problem, Target, held_out_target, problem
from hf_compress.oneshot.rounding import coordinate_descent, obs_round, refit_scales, steps
from hf_compress.oneshot.solvers import DENSE_TARGET, Solved, Solver, grid_facts, solvers
from hf_compress.oneshot.tuning import Tuning
from hf_compress.weights import Weight

DAMPING = 0.01  # where W itself is the target


@solvers.register(
    "gptq",
    summary="second-order rounding with searched scales, toward the dense model's outputs",
    paper="https://arxiv.org/abs/2210.17323",
    makes="codes",
)
def gptq(
    *,
    grid: Grid,
    grids: Mapping[str, Grid] | None = None,
    dense_target: bool = True,
    act_order: bool = True,
    search: bool = True,
    passes: int = 3,
    epochs: int = 0,
    rate: float = 0.02,
) -> Solver:
    """`searched_scales` under diag H, `obs_round`, then `passes` times `refit_scales` and `coordinate_descent`; the
    target of `held_out_target`. Weights that are 0 stay 0.

    Args:
        grids: weight name -> its own grid. dense_target: aim at the dense model's outputs; False keeps each matrix's
        own. act_order: columns of large inputs first. search: of scales that clip; False takes absmax. passes: 0 for
        GPTQ as published. epochs: passes over the text in which `tune` moves codes and scales of a block together (2:
        better at 3 bits and below, for twice the time); rate: how far a step of it goes.

    Raises:
        CompressError: while solving: the group size does not divide the inputs, weights that are not finite, a grid
        with zero points.
    """
    own = grids or {}

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        matrix = torch.cat([weight.matrix for weight in weights])
        target = held_out_target(matrix, statistics) if dense_target else Target(damping=DAMPING)
        given, heights = problem(matrix, statistics, target), [weight.shape[0] for weight in weights]
        statistics.let_go()
        wanted = given.unmasked() if dense_target else matrix.float() * given.norm
        solved = []
        for weight, goal, right in zip(weights, wanted.split(heights), given.right.split(heights), strict=True):
            part = Problem(given.gram, right, given.norm)
            with at(weight.name):
                solved.append(_one(weight.matrix, goal, part, own.get(weight.name, grid)))
        return solved

    def _one(matrix: Tensor, goal: Tensor, given: Problem, chosen: Grid) -> Solved:
        zeros = matrix == 0
        if zeros.any():
            goal = conjugate_gradients(given, ~zeros, goal.masked_fill(zeros, 0), steps=8)
        plain = given.unscaled(goal).to(matrix.dtype)
        scale = searched_scales(plain, chosen, given.norm.square()) if search else scales(plain, chosen)
        fixed = torch.full_like(goal, torch.nan).masked_fill_(zeros, 0)
        pins = pinned(plain, chosen)
        if pins is not None:
            fixed = torch.where(pins, plain.sign().float() * chosen.largest, fixed)
        step = steps(given, chosen.stored(scale))
        levels, _ = obs_round(goal, given.gram, step, chosen, fixed, act_order=act_order)
        for _ in range(passes):
            better = refit_scales(given, levels, chosen.stored(scale).float()).to(matrix.dtype)
            scale = torch.where(better > 0, better, scale) if chosen.pinned else better
            step = steps(given, chosen.stored(scale))
            levels = coordinate_descent(given, levels, step, chosen, fixed)
        ratio = None
        if epochs:  # the level that would be best with all others as they are, where rounding it gives the one it has
            ratio = levels + (given.right - (levels * step) @ given.gram) / step
            ratio = torch.where(chosen.nearest(ratio) == levels, ratio, levels)
            ratio = torch.where(fixed.isnan(), ratio, torch.nan)
        return Solved(from_codes(levels, chosen.stored(scale)), scale, ratio)

    needs = ("hessian", *(DENSE_TARGET if dense_target else ()))
    options = {"solver": "gptq", "dense_target": dense_target, "act_order": act_order, "search": search}
    options |= {"passes": passes, "epochs": epochs, "rate": rate} | grid_facts(grid, own)
    tuning = Tuning(epochs, rate, lambda name: own.get(name, grid)) if epochs else None
    return Solver(solve, needs, staged=True, refits=True, tuning=tuning, options=options)
