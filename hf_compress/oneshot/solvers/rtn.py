"""Round every weight to the nearest point of an integer grid."""

from __future__ import annotations

from collections.abc import Sequence

from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.fake_quant import Grid, fake_quantize, scales
from hf_compress.oneshot.solvers import Solved, Solver, solvers
from hf_compress.weights import Weight


@solvers.register("rtn", summary="round to nearest: no calibration, the control of every comparison", makes="codes")
def rtn(*, bits: int, group_size: int | None = None) -> Solver:
    """w -> s round(w / s), s = max |w| of the group / (2^(bits-1) - 1): (out, in), |w - q| <= s / 2, zeros stay zero.

    Raises:
        CompressError: while solving: the group size does not divide the inputs, weights that are not finite.
    """
    grid = Grid(bits, group_size)

    def solve(weights: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        return [_rounded(weight, grid) for weight in weights]

    return Solver(solve, options={"solver": "rtn", "bits": bits, "group_size": group_size})


def _rounded(weight: Weight, grid: Grid) -> Solved:
    try:
        scale = scales(weight.matrix, grid)
        return Solved(fake_quantize(weight.matrix, scale, grid), scale)
    except CompressError as error:
        raise CompressError(error.what, where=weight.name, next_step=error.next_step) from error
