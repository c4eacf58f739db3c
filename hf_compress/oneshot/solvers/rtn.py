"""Round every weight to the nearest point of an integer grid."""

from __future__ import annotations

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

    def solve(weight: Weight, statistics: Statistics) -> Solved:
        matrix = weight.matrix
        try:
            scale = scales(matrix, grid)
            return Solved(fake_quantize(matrix, scale, grid), scale)
        except CompressError as error:
            raise CompressError(error.what, where=weight.name, next_step=error.next_step) from error

    return Solver(solve, (), {"solver": "rtn", "bits": bits, "group_size": group_size})
