"""Solvers: how matrices that read one input are compressed, given what calibration saw of it. Independent of models
and containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hf_compress.criteria import Criterion, Statistics, seed_of
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.grids import Grid
from hf_compress.oneshot.tuning import Tuning
from hf_compress.registry import Registry
from hf_compress.weights import Weight

CALIBRATED = frozenset({"input_norm", "input_max", "hessian", "drift", "folds"})
"""What `Solver.needs` may name; ``drift`` brings `Statistics.residual` too, where the output joins the stream."""


@dataclass(frozen=True)
class Solved:
    """New values of a matrix, (out, in). scale: (out, groups), the grid they lie on, when the solver chose one: a
    container then stores exactly these codes instead of finding a scale of its own. None has room for zero points:
    what lies on a grid with them is for analysis. ratio: (out, in), values / scale before rounding, NaN where the
    level is fixed; what `tune` starts from."""

    values: Tensor
    scale: Tensor | None = None
    ratio: Tensor | None = None


@dataclass(frozen=True)
class Solver:
    """What the one-shot engine applies to every matrix.

    solve: (weights that read one input, its statistics) -> the new values of each; `weight.matrix` holds the old. The
    statistics are its own to use up (`Statistics.let_go`).
    needs: the `Statistics` fields it reads; without them, and without tuning, the blocks are not run at all.
    staged: inside a block too, each matrix sees what the already compressed ones before it let through.
    refits: gives weights new values fitted to the calibration text, so that too little of it is refused.
    tuning: how what it leaves of a block is tuned together, toward the dense block's outputs; None: not at all.
    options: JSON facts that tell two solvers apart, so that finished blocks of another run are not taken for this
    one's.
    """

    solve: Callable[[Sequence[Weight], Statistics], list[Solved]]
    needs: tuple[str, ...] = ()
    staged: bool = False
    refits: bool = False
    tuning: Tuning | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert set(self.needs) <= CALIBRATED, f"calibration does not make {set(self.needs) - CALIBRATED}"

    @property
    def reads_text(self) -> bool:
        """Whether the blocks are run at all."""
        return bool(self.needs) or self.tuning is not None

    @property
    def follows_dense(self) -> bool:
        """Whether it is told what the dense model does with the same text."""
        return "drift" in self.needs or self.tuning is not None


solvers: Registry[Callable[..., Solver]] = Registry("solver", __name__)
"""``solver(**options) -> Solver``. Trait `makes`: ``zeros`` (a `prune` stage) or ``codes`` (a `quantize` stage, with
options grid, the container's, and grids, weight name -> another)."""

ASKED = ("grid", "grids", "sparsity", "pattern", "group", "sparsities", "criterion", "gradients")
"""Arguments of solvers that stages and `prune` have fields of their own for."""


def options_of(name: str) -> dict[str, Any]:
    """What a recipe's `solver_options` may say: name -> default."""
    return {o.name: o.default for o in signature(solvers[name]).parameters.values() if o.name not in ASKED}


def check_solver_options(name: str, given: Mapping[str, Any], *, where: str) -> None:
    """Raise a CompressError for an option that the solver lacks (did you mean), or of another type."""
    hints = get_type_hints(solvers[name])
    known = list(options_of(name))
    for option, value in given.items():
        if option not in known:
            raise CompressError(
                f"{name} has no option {option!r}",
                where=where,
                next_step=did_you_mean(option, known) if known else "it has none: leave solver_options out",
            )
        hint = hints[option]
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
            fits = type(value) not in (int, float) or value >= 0
        except ValidationError:
            fits = False
        if not fits:
            kind = hint.__name__ if isinstance(hint, type) else str(hint)
            raise CompressError(
                f"{value!r} is no value of {name}'s {option!r}",
                where=where,
                next_step=kind + (", 0 or more" if hint in (int, float) else ""),
            )


def grid_facts(grid: Grid, own: Mapping[str, Grid]) -> dict[str, Any]:
    """Of a quantizing solver's options: they tell runs on other grids apart."""
    return grid.facts() | ({"grids": {name: each.facts() for name, each in sorted(own.items())}} if own else {})


DENSE_TARGET = ("drift", "folds")
"""What a solver asks for that aims at the dense model's outputs."""


def scored(
    criterion: Criterion, weight: Weight, statistics: Statistics, gradients: Mapping[str, Statistics] | None
) -> Tensor:
    """A criterion's scores of one weight, (out, in), from what calibration saw and (`gradients`, by weight name) what
    `gradient_statistics` found."""
    more = (gradients or {}).get(weight.name, Statistics())
    known = replace(statistics, gradient=more.gradient, fisher=more.fisher, seed=seed_of(weight.name))
    return criterion(weight.matrix, known)
