"""What a matrix should compute after its inputs have changed, as a least-squares problem. Knows nothing about models.

Conventions: W (out, in), a layer computes x W^T; H = sum over tokens of x x^T, (in, in); x, d: what the layer reads in
the compressed and in the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_compress.criteria import Statistics

DAMPINGS = (0.05, 0.1)  # of the mean diagonal of H
DEFAULT_DAMPING = 0.03
ROWS = 128


@dataclass(frozen=True)
class Target:
    """How far the dense model's outputs are followed (see `problem`): alpha for the layer's own input, beta for the
    residual stream its output is added to, and the damping that goes with them."""

    alpha: float = 0.0
    beta: float = 0.0
    damping: float = DEFAULT_DAMPING


@dataclass(frozen=True)
class Problem:
    """Minimise tr(V G V^T) - 2 tr(V B^T) over V (out, in), zero outside a mask that is given or sought.

    In coordinates where diag G = 1, so that |V_ij| = |W_ij| * ||x_j||: W = V / norm.
    gram: G, (in, in). right: B, (out, in). norm: (in,).
    """

    gram: Tensor
    right: Tensor
    norm: Tensor

    def unscaled(self, values: Tensor) -> Tensor:
        """V -> W."""
        return values / self.norm

    def loss(self, values: Tensor) -> Tensor:
        """tr(V G V^T) - 2 tr(V B^T): lower is better, 0 has no meaning."""
        return (values * (values @ self.gram - 2 * self.right)).sum()

    def unmasked(self) -> Tensor:
        """The minimiser without a mask, B G^-1: the target itself, (out, in)."""
        solved: Tensor = torch.cholesky_solve(self.right.T, torch.linalg.cholesky(self.gram)).T
        return solved


def problem(matrix: Tensor, statistics: Statistics, target: Target) -> Problem:
    """The problem of a matrix W (out, in) whose outputs should be the dense model's.

    With X, D the inputs of the compressed and of the dense model and R their difference in the residual stream
    (dense - compressed, (tokens, out)), G = H + damping * mean(diag H) * I, the target is

        T = W + [alpha W (D - X)^T X + beta R^T X] G^-1        B = T G = W G + alpha W drift + beta residual

    alpha = beta = 0 is the classical layer-wise problem, which keeps W's answers on inputs that are off already;
    alpha = beta = 1 gives the dense block's outputs as far as H, measured on few tokens, can tell.
    """
    assert statistics.hessian is not None
    hessian, matrix = statistics.hessian, matrix.float()
    added = _added(hessian, target.damping)
    right = matrix @ hessian + added * matrix
    for share, pull in zip((target.alpha, target.beta), _pulls(matrix, statistics), strict=False):
        right += share * pull
    norm = (hessian.diagonal() + added).sqrt()
    gram = hessian / norm / norm[:, None]
    gram.diagonal().fill_(1.0)
    return Problem(gram, right / norm, norm)


def held_out_target(matrix: Tensor, statistics: Statistics, *, follow: bool = True) -> Target:
    """alpha, beta and damping that do best on calibration text they were not fitted to.

    On one half of the text the directions A_k = pull_k G^-1 of `problem` are fitted; on the other half the error

        || (sum_k c_k A_k) X - (the dense block's output there, less W X) ||^2

    is quadratic in the c, so its minimiser solves a 2 x 2 system, summed over both ways round. Each damping has its
    own; the best is kept. Twice the text halves the noise of a direction: c = s / (s + n) becomes s / (s + n / 2).

    They are numbers that all rows share, so at most `ROWS` of these are looked at. Where a half saw nothing, or follow
    is False, the target is W itself.
    """
    halves = statistics.folds
    if not follow or statistics.drift is None or len(halves) != 2 or min(h.tokens for h in halves) == 0:
        return Target()
    matrix, halves = _some_rows(matrix.float(), halves)
    best: tuple[float, Target] | None = None
    for damping in DAMPINGS:
        square, against = (torch.zeros(*size, device=matrix.device) for size in ((2, 2), (2,)))
        for fitted, held in (halves, halves[::-1]):
            factor = _factor(fitted, damping)
            directions = [torch.cholesky_solve(p.T, factor).T for p in _pulls(matrix, fitted)]
            wanted = sum(_pulls(matrix, held)[1:], start=_pulls(matrix, held)[0])
            assert held.hessian is not None
            for i, one in enumerate(directions):
                image = one @ held.hessian
                against[i] += (one * wanted).sum()
                for j, other in enumerate(directions):
                    square[i, j] += (image * other).sum()
        count = len(directions)
        square, against = square[:count, :count], against[:count]
        tiny = 1e-6 * square.diagonal().max().clamp_min(1e-30) * torch.eye(count, device=matrix.device)
        shares = torch.linalg.solve(square + tiny, against)
        gain = float(against @ shares)
        if best is None or gain > best[0]:
            alpha, beta = (*(_with_twice_the_text(float(c)) for c in shares), 0.0)[:2]
            best = gain, Target(alpha, beta, damping)
    assert best is not None
    return best[1]


def _some_rows(matrix: Tensor, halves: tuple[Statistics, ...]) -> tuple[Tensor, tuple[Statistics, ...]]:
    every = slice(None, None, -(-len(matrix) // ROWS))
    pulls = [None if half.residual is None else half.residual[every] for half in halves]
    return matrix[every], tuple(replace(half, residual=pull) for half, pull in zip(halves, pulls, strict=True))


def _with_twice_the_text(share: float) -> float:
    return 0.0 if share <= 0 else 1.0 if share >= 1 else 2 * share / (1 + share)


def _pulls(matrix: Tensor, statistics: Statistics) -> list[Tensor]:
    """The two terms of B that alpha and beta weight, (out, in); only those there are statistics for."""
    pulls = []
    if statistics.drift is not None:
        pulls.append(matrix @ statistics.drift)
        if statistics.residual is not None:
            pulls.append(statistics.residual)
    return pulls


def _added(hessian: Tensor, damping: float) -> Tensor:
    mean = hessian.diagonal().mean()
    return torch.where(mean > 0, damping * mean, torch.ones_like(mean))


def _factor(statistics: Statistics, damping: float) -> Tensor:
    assert statistics.hessian is not None
    moved = statistics.hessian.clone()
    moved.diagonal().add_(_added(moved, damping))
    factor: Tensor = torch.linalg.cholesky(moved)
    return factor
