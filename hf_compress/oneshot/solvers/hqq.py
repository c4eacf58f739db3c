"""Round to the nearest, at scales that outliers do not decide: no calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError, at
from hf_compress.grids import Grid, codes, from_codes, pinned, spanning
from hf_compress.oneshot.half_quadratic import half_quadratic
from hf_compress.oneshot.solvers import Solved, Solver, grid_facts, solvers
from hf_compress.weights import Weight


@solvers.register(
    "hqq",
    summary="half-quadratic: scales for the p-th power of the error, p < 1; no calibration",
    paper="https://mobiusml.github.io/hqq_blog/",
    makes="codes",
)
def hqq(
    *, grid: Grid, grids: Mapping[str, Grid] | None = None, p: float = 0.7, beta: float = 10.0, steps: int = 20
) -> Solver:
    """`half_quadratic` from the scales of `rtn`, then the nearest points. Weights that are 0 stay 0.

    Args:
        grids: weight name -> its own grid. p: power of the error, above 0 and up to 1. beta: how soon an error counts
        as one that is let go, in steps of the grid.

    Raises:
        CompressError: p out of range; while solving: the group size does not divide the inputs, weights that are not
        finite.
    """
    if not 0 < p <= 1:
        raise CompressError(f"p is above 0 and up to 1, not {p:g}", where="solver_options.p")
    own = grids or {}

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        return [_one(weight, own.get(weight.name, grid)) for weight in weights]

    def _one(weight: Weight, chosen: Grid) -> Solved:
        matrix = weight.matrix
        with at(weight.name):
            first, start = spanning(matrix, chosen)
        scale, zero = half_quadratic(matrix, first, start, chosen, p=p, beta=beta, steps=steps)
        stored = chosen.stored(scale)
        level, pins = codes(matrix, stored, chosen, zero), pinned(matrix, chosen)
        if pins is not None:
            level = level.where(~pins, matrix.sign().float() * chosen.largest)
        return Solved(from_codes(level, stored, zero), scale)

    options = {"solver": "hqq", "p": p, "beta": beta, "steps": steps} | grid_facts(grid, own)
    return Solver(solve, options=options)
