"""One-shot pruning of a model that fits in memory, and what any one-shot pruning is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.budgets import given, outlier_ratio, owl
from hf_compress.calibration import Batch
from hf_compress.criteria import ONESHOT, Statistics, criteria, usable
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.oneshot.engine import OneshotReport, run_blocks
from hf_compress.oneshot.gradients import gradient_statistics
from hf_compress.oneshot.memory import InMemory, compress_blocks
from hf_compress.oneshot.solvers import Solved, Solver, check_solver_options, solvers
from hf_compress.patterns import NM, check_fits, check_target, parse_pattern
from hf_compress.selection import without
from hf_compress.weights import Weight, weights

GRADIENTS = frozenset({"gradient", "fisher"})


@dataclass
class PruneOptions:
    """What to prune and how: the arguments of `prune`, and keys of a `prune` stage."""

    sparsity: float = field(default=0.5, metadata={"help": "share of each weight matrix set to zero"})
    method: str | None = field(
        default=None,
        metadata={
            "help": "solver (see `hf-compress list solvers`); none = alps, or, where a criterion is given, criterion, "
            "which zeroes weights and refits none"
        },
    )
    criterion: str | None = field(
        default=None,
        metadata={"help": "importance of a weight, for methods criterion and least_squares; none = wanda"},
    )
    pattern: str = field(
        default="unstructured",
        metadata={"help": "unstructured; N:M along the inputs (2:4); blocks of outputs x inputs (4x1)"},
    )
    group: str | None = field(
        default=None, metadata={"help": "what competes: each row, or each layer (one matrix); none = the method's"}
    )
    budget: str = field(
        default="uniform", metadata={"help": "sparsity of a block: uniform, or owl (blocks with outliers keep more)"}
    )
    sparsities: dict[str, float] = field(
        default_factory=dict, metadata={"help": "regular expression -> sparsity of the weights it finds, for some"}
    )
    solver_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further options of the method, such as epochs of alps (see `hf-compress list alps`)"},
    )
    skip: list[str] = field(default_factory=list, metadata={"help": "regular expressions of weights to leave dense"})

    def check_options(self) -> None:
        """Raise a CompressError for what cannot work, whatever the model."""
        makers = [entry.name for entry in solvers if entry.traits["makes"] == "zeros"]
        if self.chosen_method not in makers:
            raise CompressError(
                f"no solver {self.method!r} for pruning",
                where="method",
                next_step=did_you_mean(self.chosen_method, makers),
            )
        check_solver_options(self.chosen_method, self.solver_options, where="solver_options")
        check_target(self.sparsity, self.pattern)
        if self.criterion is not None and not self._takes_criterion:
            raise CompressError(
                f"{self.method!r} finds its own mask and takes no criterion",
                where="criterion",
                next_step="leave criterion out, or use method: criterion",
            )
        if self.criterion is not None:
            usable(self.criterion, ONESHOT, during="one-shot pruning", where="criterion")
        if self.budget not in ("uniform", "owl"):
            raise CompressError(
                f"unknown budget {self.budget!r}",
                where="budget",
                next_step=did_you_mean(self.budget, ("uniform", "owl")),
            )
        if self.budget == "owl" and (self.sparsities or self.pattern != "unstructured"):
            raise CompressError(
                "owl gives every block a sparsity of its own",
                where="budget",
                next_step="use it with pattern: unstructured and without sparsities",
            )
        if self.budget == "owl":
            owl({0: 0.0}, {0: 1}, sparsity=self.sparsity)
        if self.group is not None and self.pattern != "unstructured" and isinstance(parse_pattern(self.pattern), NM):
            raise CompressError(
                f"{self.pattern} compares within its own groups", where="group", next_step="leave group out"
            )
        self._solver({"sparsities": self.sparsities})  # what the solver itself refuses

    @property
    def chosen_method(self) -> str:
        return self.method or ("alps" if self.criterion is None else "criterion")

    @property
    def _takes_criterion(self) -> bool:
        return "takes_criterion" in solvers.entry(self.chosen_method).traits

    @property
    def whole_model(self) -> bool:
        """Whether something needs the whole model in memory: gradients, or budgets from all blocks' scores."""
        return self.budget == "owl" or bool(GRADIENTS & set(self._criterion_needs))

    @property
    def _criterion_needs(self) -> tuple[str, ...]:
        return criteria.entry(self.criterion or "wanda").traits["needs"] if self._takes_criterion else ()

    def names(self, model: PreTrainedModel) -> list[str]:
        """The weights to prune.

        Raises:
            CompressError: an expression of `skip` that finds nothing (did you mean), or everything.
        """
        return without([w.name for w in weights(model)], self.skip, where="skip")

    def solver(self, model: PreTrainedModel, batches: list[Batch]) -> Solver:
        """For this model; with gradients or owl it is run over the batches here.

        Raises:
            CompressError: expressions that find nothing; a pattern that does not fit (naming the weight); what
            `gradient_statistics` finds wrong.
        """
        names = self.names(model)
        wanted = set(names)
        for weight in weights(model):
            if weight.name in wanted:
                check_fits(weight.shape, self.pattern, where=weight.name)
        own = given(names, self.sparsities, sparsity=self.sparsity, where="sparsities") if self.sparsities else {}
        if self.budget == "owl":
            own = owl_sparsities(model, batches, names, sparsity=self.sparsity)
        more: dict[str, Any] = {"sparsities": own}
        if GRADIENTS & set(self._criterion_needs):
            more["gradients"] = gradient_statistics(model, batches)
        return self._solver(more)

    def _solver(self, more: dict[str, Any]) -> Solver:
        options = {"sparsity": self.sparsity, "pattern": self.pattern, "group": self.group}
        options |= self.solver_options | more
        if self._takes_criterion:
            options["criterion"] = self.criterion or "wanda"
        return solvers[self.chosen_method](**options)


def prune(
    model: PreTrainedModel, batches: list[Batch], *, resume_dir: Path | None = None, **options: Any
) -> OneshotReport:
    """``prune(model, batches, sparsity=0.5, pattern="2:4")``: zero weights of every block matrix in place, in one
    shot, and refit what is left. Makes no file smaller and no stock runtime faster.

    Args:
        batches: calibration inputs, input_ids and attention_mask, (batch, tokens) each; magnitude needs none.
        options: the fields of `PruneOptions`.

    Raises:
        CompressError: as `PruneOptions.check_options`, `PruneOptions.solver` and `compress_blocks`.
    """
    known = [f.name for f in fields(PruneOptions)]
    for name in options:
        if name not in known:
            raise CompressError(f"prune has no option {name!r}", where="prune", next_step=did_you_mean(name, known))
    wanted = PruneOptions(**options)
    wanted.check_options()
    solver = wanted.solver(model, batches)
    return compress_blocks(model, batches, solver, only=wanted.names(model), resume_dir=resume_dir)


def owl_sparsities(
    model: PreTrainedModel, batches: list[Batch], names: list[str], *, sparsity: float
) -> dict[str, float]:
    """Weight name -> the sparsity of its block by `owl`, from Wanda's scores in the dense model."""
    ratios: dict[int, float] = {}
    sizes: dict[int, int] = {}
    scores: dict[int, list[Tensor]] = {}  # of the block at work

    def close(*blocks: int) -> None:
        for block in blocks:
            done = scores.pop(block)
            ratios[block], sizes[block] = outlier_ratio(done), sum(one.numel() for one in done)

    def look(group: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        block = group[0].block
        assert block is not None
        if block not in scores:
            close(*scores)
            scores[block] = []
        scores[block].extend(criteria["wanda"](weight.matrix, statistics) for weight in group)
        return [Solved(weight.matrix) for weight in group]

    run_blocks(model, batches, Solver(look, ("input_norm",)), InMemory(model, None, ""), only=names)
    close(*scores)
    shared = owl(ratios, sizes, sparsity=sparsity)
    wanted = set(names)
    return {w.name: shared[w.block] for w in weights(model) if w.block is not None and w.name in wanted}
