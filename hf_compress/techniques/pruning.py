"""Set weights to zero while training, more of them as a schedule says, and keep them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.budgets import given
from hf_compress.criteria import criteria
from hf_compress.errors import CompressError
from hf_compress.masks import sha256
from hf_compress.patterns import check_fits
from hf_compress.selection import without
from hf_compress.source import require_unquantized
from hf_compress.techniques.base import Technique
from hf_compress.techniques.choosing import chosen, owl_sparsities, present
from hf_compress.techniques.gathering import GRADIENTS, Gathered
from hf_compress.techniques.lora import check_teacher, merge_in_forward
from hf_compress.techniques.masking import Masks
from hf_compress.techniques.pruning_options import check_options
from hf_compress.techniques.rewinding import Snapshot
from hf_compress.techniques.schedule import Plan, steps_in_epoch
from hf_compress.weights import Weight, weights

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


@dataclass(eq=False)
class Pruning(Technique):
    """``Pruning(sparsity=0.5, pattern="2:4")``: masks over every attention, FFN and expert matrix.

    A mask is chosen by the criterion among what is left, so masks are nested; it holds on gradients, weights and the
    optimizer's moments from then on. With LoRA it acts on W + BA in the forward, and train() ends with the adapters
    merged: `trainer.model` is then the plain model. Moments (`begin`, `end`, `every`, `rewind_to`) are shares of all
    steps (0.75), steps (200) or epochs (``"2 epochs"``).
    """

    sparsity: float = field(default=0.5, metadata={"help": "share of all masked weights that ends as zero"})
    pattern: str = field(
        default="unstructured",
        metadata={"help": "unstructured; N:M along the inputs (2:4); blocks of outputs x inputs (4x1)"},
    )
    criterion: str = field(
        default="magnitude", metadata={"help": "importance of a weight: see `hf-compress list criteria`"}
    )
    group: str | None = field(
        default=None,
        metadata={"help": "what competes: each row, each layer (one matrix), or global (all); none = the criterion's"},
    )
    schedule: str = field(
        default="cubic",
        metadata={"help": "cubic, linear, oneshot, iterative (prune, retrain, again), or constant (keep the zeros)"},
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "sparsity where the schedule begins"})
    begin: float | str = field(
        default=0.0, metadata={"help": "where pruning begins: a share of all steps, steps, or '2 epochs'"}
    )
    end: float | str = field(
        default=0.75, metadata={"help": "where the last mask is chosen; the rest of the run recovers"}
    )
    every: float | str = field(default=10, metadata={"help": "steps (or share, or epochs) between two mask updates"})
    cycles: int | None = field(default=None, metadata={"help": "iterative: how many times to prune and retrain"})
    rewind_to: float | str | None = field(
        default=None, metadata={"help": "iterative: after each cut, survivors go back to their values at this moment"}
    )
    budget: str = field(
        default="uniform", metadata={"help": "sparsity of a block: uniform, or owl (blocks with outliers keep more)"}
    )
    sparsities: dict[str, float] = field(
        default_factory=dict, metadata={"help": "regular expression -> sparsity of the weights it finds, for some"}
    )
    skip: list[str] = field(default_factory=list, metadata={"help": "regular expressions of weights to leave dense"})

    def check(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """The `Statistics` fields that training has to collect."""
        return () if self.schedule == "constant" else criteria.entry(self.criterion).traits["needs"]

    def attach(self, model: nn.Module) -> None:
        require_unquantized(model, where="prune")
        everything = weights(model)
        names = without([w.name for w in everything], self.skip, where="prune.skip")
        self._weights = [w for w in everything if w.name in set(names)]
        for weight in self._weights:
            out, width = weight.matrix.shape  # or says that a quantizer packed it
            check_fits((out, width), self.pattern, where=weight.name)
        self._own = given(names, self.sparsities, sparsity=self.sparsity, where="prune.sparsities")
        self._adapted = merge_in_forward(model, self._weights, where="prune")
        if self._adapted and GRADIENTS & set(self.needs):
            raise CompressError(
                f"{self.criterion!r} needs gradients of the weights, and with LoRA only A and B have any",
                where="prune.criterion",
                next_step="use magnitude or wanda, or train the whole weights",
            )
        self._masks = Masks(self._weights, self._adapted)
        for parameter, layer in self._adapted.items():
            layer.changes.append(partial(self._masks.masked, parameter))
        self._gathered = Gathered(model, self._weights, self.needs)
        self._snapshot = Snapshot(model)
        self._plan: Plan | None = None
        self._seed, self._shared = 0, False  # shared: owl's budgets are made
        if self.schedule == "constant":
            present(self._weights, sparsity=self.sparsity, pattern=self.pattern)  # says before training what is wrong

    def prepare(self, trainer: CompressionTrainer) -> None:
        check_teacher(trainer.techniques, self._weights, self._adapted, where="prune")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seed = args.seed
        self._plan = Plan.of(
            state,
            steps_in_epoch(args, kwargs["train_dataloader"]),
            schedule=self.schedule,
            begin=self.begin,
            end=self.end,
            every=self.every,
            cycles=self.cycles,
            rewind_to=self.rewind_to,
            waits=bool(self.needs),
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._plan is not None
        step, optimizer = state.global_step, kwargs["optimizer"]
        if step == self._plan.rewind:
            self._snapshot.take(optimizer)
        if not self._plan.due(step):
            return
        if self.schedule == "constant":
            found = present(self._weights, sparsity=self.sparsity, pattern=self.pattern)
        else:
            found = self._choose(self._plan.sparsity(step, initial=self.initial_sparsity, final=self.sparsity))
        for weight, mask in found:
            self._masks.set(weight, mask)
        if self._snapshot and step != self._plan.rewind:
            self._snapshot.restore(optimizer)
        self._masks.apply(optimizer)
        self._gathered.reset()

    @torch.no_grad()
    def _choose(self, sparsity: float) -> list[tuple[Weight, Tensor]]:
        criterion = criteria.entry(self.criterion)
        if sparsity == 0:  # nothing to rank yet, and perhaps no statistics to rank by
            return [(w, self._masks.of(w)) for w in self._weights]

        def score(weight: Weight) -> Tensor:
            return criterion.value(self._matrix(weight), self._gathered.statistics(weight, self._seed))

        if self.budget == "owl" and not self._shared:
            self._own, self._shared = owl_sparsities(score, self._weights, sparsity=self.sparsity), True
        shares = {name: own / self.sparsity for name, own in self._own.items()}
        group = self.group or criterion.traits["group"]
        return list(chosen(score, self._masks, sparsity=sparsity, shares=shares, pattern=self.pattern, group=group))

    def _matrix(self, weight: Weight) -> Tensor:
        layer = self._adapted.get(weight.parameter)
        return weight.matrix if layer is None else weight.of(layer.weight())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._gathered.add_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._masks.apply(kwargs["optimizer"])

    def settled(self, step: int, max_steps: int) -> bool:
        return self._plan is not None and step > self._plan.last

    def progress(self) -> dict[str, float]:
        return {"sparsity": round(self._sparsity(), 4)}

    def _sparsity(self) -> float:
        """Share of zeros among the weights that have a mask."""
        masks = self._masks.items().values()
        return sum(int((~m).sum()) for m in masks) / max(1, sum(m.numel() for m in masks))

    def state(self) -> dict[str, Tensor]:
        parts = {"mask": self._masks.state(), "gathered": self._gathered.state(), "rewind": self._snapshot.state()}
        own = {"budget": torch.tensor([self._own[w.name] for w in self._weights], dtype=torch.float64)}
        return {f"{part} {key}": value for part, kept in parts.items() for key, value in kept.items()} | (
            own if self._shared else {}
        )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name} "): v for k, v in state.items() if k.startswith(f"{name} ")}

        self._masks.load(part("mask"))
        self._gathered.load(part("gathered"))
        self._snapshot.load(part("rewind"))
        if "budget" in state:
            own = zip((w.name for w in self._weights), state["budget"].tolist(), strict=True)
            self._own, self._shared = dict(own), True

    def finalize(self, model: nn.Module) -> None:
        if not self._masks:
            raise CompressError(
                "the run ended before pruning began", where="prune.begin", next_step="lower begin, or train longer"
            )
        self._gathered.close()
        self._masks.bake()

    def facts(self) -> dict[str, Any]:
        masks = self._masks.items()
        return {
            "pattern": self.pattern,
            "criterion": self.criterion,
            "group": self.group or criteria.entry(self.criterion).traits["group"],
            "schedule": self.schedule,
            "cycles": self.cycles,
            "rewind_to": self.rewind_to,
            "target": self.sparsity,
            "budget": self.budget,
            "sparsity": self._sparsity(),
            "weights": len(masks),
            "masks_sha256": sha256(masks),
        }
