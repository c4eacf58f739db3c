"""Round every weight to the nearest point of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_compress.criteria import Statistics
from hf_compress.errors import at
from hf_compress.grids import Grid, fake_quantize, spanning
from hf_compress.oneshot.solvers import Solved, Solver, grid_facts, solvers
from hf_compress.weights import Weight


@solvers.register("rtn", summary="round to nearest: no calibration, the control of every comparison", makes="codes")
def rtn(*, grid: Grid, grids: Mapping[str, Grid] | None = None) -> Solver:
    """w -> s (nearest(w / s + z) - z), (out, in), at scales and zeros that clip nothing (`spanning`): |w - q| <= s / 2
    on integer grids, zeros stay zero.

    Args:
        grids: weight name -> its own grid.

    Raises:
        CompressError: while solving: the group size does not divide the inputs, weights that are not finite.
    """
    own = grids or {}

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        return [_rounded(weight, own.get(weight.name, grid)) for weight in weights]

    return Solver(solve, options={"solver": "rtn"} | grid_facts(grid, own))


def _rounded(weight: Weight, grid: Grid) -> Solved:
    with at(weight.name):
        scale, zero = spanning(weight.matrix, grid)
        return Solved(fake_quantize(weight.matrix, grid.stored(scale), grid, zero), scale)
