"""Train with the rounding that a container will apply, so that what ships is what was trained."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.calibration import tokens_in, with_continuations, writes_nothing
from hf_compress.errors import CompressError
from hf_compress.grids import Grid
from hf_compress.observers import OBSERVERS, Observer, percentile
from hf_compress.selection import without
from hf_compress.source import require_unquantized
from hf_compress.techniques.base import Technique
from hf_compress.techniques.calibrated_start import solved, training_batches
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.inputs import Inputs
from hf_compress.techniques.lora import check_teacher, merge_in_forward
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat_options import METHODS, check_beside, check_options, notes
from hf_compress.techniques.rounding import Rounding
from hf_compress.techniques.schedule import steps_in_epoch, steps_of
from hf_compress.techniques.shadows import Change, shadow
from hf_compress.weights import Weight, base_of, require_one_device, weights

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


@dataclass(eq=False)
class QAT(Technique):
    """``QAT(bits=4, group_size=32)``: every forward sees rounded weights, the gradient passes straight through to the
    real ones (of ``method="scales"`` to their scales alone).

    Rounded tensors stand where modules read their weights, so the state_dict stays plain. With LoRA it is W + BA that
    is rounded, and train() ends with the adapters merged. `finalize` leaves the rounded values in the weights and
    their `scales` here, with which a container of the same grid stores exactly what was trained:
    ``quantize(trainer.model, "out", backend="compressed-tensors", bits=4, group_size=32, scales=qat.scales)``.
    Moments (`begin`, `freeze_after`) are shares of all steps (0.75), steps (200) or epochs (``"2 epochs"``).
    """

    bits: int = field(default=4, metadata={"help": "bits a weight"})
    group_size: int | None = field(
        default=None, metadata={"help": "weights that share a scale along the inputs; none = a whole row"}
    )
    kind: str = field(
        default="int",
        metadata={
            "help": "levels: int (compressed-tensors), nf4 or fp4 in groups of 64 (bitsandbytes); uint, powers of 2, "
            "a codebook fitted by k-means (no container)"
        },
    )
    method: str = field(
        default="ste",
        metadata={
            "help": "ste: scales follow the largest weight of each group; lsq: they are learned and may clip; scales: "
            "nothing else is learned of a rounded weight, its codes stay as they begin (as EfficientQAT ends)"
        },
    )
    scale_start: str = field(
        default="search",
        metadata={"help": "lsq begins with scales of least squared error (search), or with its paper's (mean)"},
    )
    start: str = field(
        default="dense",
        metadata={
            "help": "rounding begins from the weights as they are (dense), or from what the one-shot solver makes of "
            "them on training text (gptq: with lsq or scales, or nf4 and fp4)"
        },
    )
    samples: int = field(default=128, metadata={"help": "rows of training text that `start: gptq` reads"})
    continuations: int = field(
        default=0,
        metadata={
            "help": "how many more rows the model writes for each of `samples`, from its first 16 tokens at most"
        },
    )
    start_epochs: int = field(
        default=0,
        metadata={"help": "passes over them in which `start: gptq` moves the levels of a block together too"},
    )
    scale_rate: float = field(
        default=10.0,
        metadata={"help": "lsq, scales: learning rate of the scales' logarithms, over that of the weights"},
    )
    activations: int | None = field(
        default=None, metadata={"help": "bits of what enters each layer; none = not rounded"}
    )
    ranges: str = field(
        default="token",
        metadata={
            "help": "of activations: token = each its own, as W8A8 computes; or one for all, watched by min_max, "
            "percentile, mse or entropy"
        },
    )
    percentile: float = field(default=99.99, metadata={"help": "share in percent that `ranges: percentile` keeps"})
    begin: float | str = field(
        default=0.0, metadata={"help": "where rounding begins: a share of all steps, steps, or '2 epochs'"}
    )
    freeze_after: float | str | None = field(
        default=None, metadata={"help": "from here on scales and ranges stay as they are; none = never"}
    )
    skip: list[str] = field(
        default_factory=list, metadata={"help": "regular expressions of weights to leave as they are"}
    )

    def check(self) -> None:
        check_options(self)

    @property
    def grid(self) -> Grid:
        """Of every weight (a codebook's levels are fitted to each parameter)."""
        return Grid(self.bits, self.group_size, self.kind, pinned=self.kind in ("nf4", "fp4"))

    @property
    def rate(self) -> float:
        return self.scale_rate

    def check_model(self, model: nn.Module) -> None:
        """From names and shapes alone, so `model` may be on the meta device.

        Raises:
            CompressError: an expression of `skip` that finds nothing, or some experts of a parameter; a group size
            that does not divide the inputs; rounded activations of stacked experts; continuations of a model that
            writes no text.
        """
        if self.continuations and (why := writes_nothing(base_of(model))):
            raise CompressError(why, where="qat.continuations", next_step="leave continuations out")
        for weight in (w for several in self._parts(model) for w in several):
            if weight.shape[1] % (self.group_size or 1):
                raise CompressError(
                    f"group size {self.group_size} does not divide {weight.shape[1]} inputs",
                    where=f"qat.group_size: {weight.name}",
                    next_step="pick a divisor of the inputs, or skip these weights",
                )
            if self.activations is not None and weight.expert is not None:
                raise CompressError(
                    "what enters stacked experts cannot be rounded: no container that transformers opens does it",
                    where=f"qat.activations: {weight.name}",
                    next_step="leave activations out",
                )

    def attach(self, model: nn.Module) -> None:
        require_unquantized(model, where="qat")
        require_one_device(model, where="qat")
        self.check_model(model)
        parts = self._parts(model)
        everything = [weight for several in parts for weight in several]
        self._adapted = merge_in_forward(model, everything, where="qat")
        method = METHODS[self.method]
        self._weights = everything
        self._roundings = [
            Rounding(several, self.grid, learn=method.learns, fixed=method.fixed, start=self.scale_start)
            for several in parts
        ]
        self._scales: dict[str, Tensor] | None = None
        self._on, self._first, self._freeze, self._read = False, 0, -1, 0
        modules: dict[nn.Module, dict[str, tuple[str, Change]]] = defaultdict(dict)
        for rounding in self._roundings:
            layer, change = self._adapted.get(rounding.name), partial(self._change, rounding)
            if layer is None:
                modules[rounding.parts[0].module][rounding.parts[0].attribute] = (rounding.name, change)
            else:
                layer.changes.append(change)
        self._hooks = [hook for module, changes in modules.items() for hook in shadow(module, changes)]
        self._inputs = self._watched()

    def _parts(self, model: nn.Module) -> list[list[Weight]]:
        """The weights to round, those of one parameter together."""
        everything = weights(model)
        names = set(without([w.name for w in everything], self.skip, where="qat.skip"))
        found: dict[str, list[Weight]] = defaultdict(list)
        for weight in everything:
            found[weight.parameter].append(weight)
        for several in found.values():
            if 0 < sum(w.name in names for w in several) < len(several):
                raise CompressError(
                    "some experts of one parameter are skipped and others are not",
                    where=f"qat.skip: {several[0].parameter}",
                    next_step="skip all of them, or none",
                )
        return [several for several in found.values() if several[0].name in names]

    def _watched(self) -> Inputs | None:
        if self.activations is None:
            return None
        observer: Observer | None = OBSERVERS.get(self.ranges)
        if self.ranges == "percentile":
            observer = partial(percentile, share=self.percentile)
        return Inputs({w.module_name: w.module for w in self._weights}, self.activations, observer)

    def _change(self, rounding: Rounding, stored: Tensor) -> Tensor:
        return rounding(stored) if self._on else stored

    def _stored(self, rounding: Rounding) -> Tensor:
        layer = self._adapted.get(rounding.name)
        return rounding.parts[0].whole if layer is None else layer.weight()

    def _start(self) -> None:
        scales: Mapping[str, Tensor] = {}
        if self.start == "gptq":
            batches = training_batches(self._trainer, self.samples)
            writer, seed = base_of(self._trainer.model), self._trainer.args.seed
            kept = self._kept_start
            if kept is not None:
                kept.mkdir(parents=True, exist_ok=True)
            saved = None if kept is None else kept / "continuations.safetensors"
            batches = with_continuations(writer, batches, self.continuations, seed=seed, saved=saved)
            self._read = tokens_in(batches)
            scales = solved(
                self._trainer.model, self._weights, self.grid, batches, epochs=self.start_epochs, resume_dir=kept
            )
        self._on = True
        for rounding in self._roundings:
            rounding.begin(self._stored(rounding), scales)
        if self._inputs is not None:
            self._inputs.on = True

    @property
    def _kept_start(self) -> Path | None:
        """Where blocks that gptq has rounded wait for the run's first checkpoint, so that an interruption before it
        loses none; None where they are of weights that trained before, or of several ranks."""
        kept = self.start == "gptq" and self.begin == 0 and not torch.distributed.is_initialized()
        return Path(self._trainer.args.output_dir) / "_qat-start" if kept else None

    def _forget_start(self) -> None:
        if self._kept_start is not None:
            shutil.rmtree(self._kept_start, ignore_errors=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._forget_start()

    def prepare(self, trainer: CompressionTrainer) -> None:
        check_teacher(trainer.techniques, self._weights, self._adapted, where="qat")
        check_beside(self, pruned=any(isinstance(t, Pruning) for t in trainer.techniques), adapted=bool(self._adapted))
        if self._inputs is not None and any(
            isinstance(t, Distillation) and t.learns_from_base for t in trainer.techniques
        ):
            raise CompressError(
                "the teacher `base` would compute with rounded activations too",
                where="qat.activations",
                next_step="leave activations out, or load the teacher from a folder",
            )
        self._trainer = trainer
        for rounding in self._roundings:
            rounding.to(trainer.args.device)
        wholes = [rounding.parts[0].whole for rounding in self._roundings] if METHODS[self.method].fixed else []
        self._resting = [whole for whole in wholes if whole.requires_grad]
        for whole in self._resting:
            whole.requires_grad_(False)
        if self.begin == 0 and self.start == "dense":
            self._start()

    def parameters(self) -> list[nn.Parameter]:
        return [rounding.theta for rounding in self._roundings if rounding.theta is not None]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        total, epoch = state.max_steps, steps_in_epoch(args, kwargs["train_dataloader"])
        self._first = steps_of(self.begin, total=total, epoch=epoch, where="qat.begin")
        if self.freeze_after is not None:
            self._freeze = steps_of(self.freeze_after, total=total, epoch=epoch, where="qat.freeze_after")
        wrong = {
            f"rounding begins at step {self._first}, and the run has {total}": self._first >= total,
            f"ranges freeze at step {self._freeze}, and rounding begins at step {self._first}": (
                self.freeze_after is not None and not self._first < self._freeze
            ),
        }
        for what, is_so in wrong.items():
            if is_so:
                raise CompressError(what, where="qat", next_step="change begin, freeze_after or the run's length")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._on and state.global_step >= self._first:
            self._start()
        if self._freeze == state.global_step:
            for rounding in self._roundings:
                rounding.freeze(self._stored(rounding))
            if self._inputs is not None:
                self._inputs.freeze()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._inputs is not None:
            self._inputs.after_step()

    def settled(self, step: int, max_steps: int) -> bool:
        return step > self._first

    def state(self) -> dict[str, Tensor]:
        found = {"on": torch.tensor([self._on]), "read": torch.tensor([self._read])}
        for rounding in self._roundings:
            found |= {f"{key} {rounding.name}": value for key, value in rounding.state().items()}
        if self._inputs is not None:
            found |= {f"inputs {key}": value for key, value in self._inputs.state().items()}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._on, self._read = bool(state["on"][0]), int(state["read"][0])
        for rounding in self._roundings:
            end = f" {rounding.name}"
            rounding.load({key.removesuffix(end): value for key, value in state.items() if key.endswith(end)})
        if self._inputs is not None:
            self._inputs.on = self._on
            self._inputs.load({k.removeprefix("inputs "): v for k, v in state.items() if k.startswith("inputs ")})

    @torch.no_grad()
    def finalize(self, model: nn.Module) -> None:
        self._forget_start()
        for hook in self._hooks:
            hook.remove()
        if self._inputs is not None:
            self._inputs.remove()
        if not self._on:
            raise CompressError(
                f"the run ended before step {self._first}, where rounding begins: the weights were never rounded",
                where="qat.begin",
                next_step="train longer, or begin earlier",
            )
        self._scales = {name: scale for r in self._roundings for name, scale in r.bake().items()}
        for whole in self._resting:
            whole.requires_grad_(True)

    @property
    def scales(self) -> dict[str, Tensor]:
        """Weight name -> (out, groups) of the values that `finalize` left.

        Raises:
            CompressError: the run has not ended.
        """
        if self._scales is None:
            raise CompressError("scales are there when train() has ended", where="qat.scales")
        return self._scales

    def facts(self) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.activations is not None:
            more |= {"activations": self.activations, "ranges": self.ranges}
        if self.start != "dense":
            more |= {"calibration_tokens": self._read, "start_epochs": self.start_epochs}
            more |= {"continuations": self.continuations} if self.continuations else {}
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "kind": self.kind,
            "method": self.method,
            "start": self.start,
            "begin": self.begin,
            "freeze_after": self.freeze_after,
            "weights": len(self._weights),
            "notes": notes(self),
        } | more
