"""Set weights to zero while training, more of them as a schedule says, and keep them there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.criteria import Statistics, criteria
from hf_compress.errors import CompressError
from hf_compress.patterns import check_target, mask_of
from hf_compress.techniques.base import Technique
from hf_compress.weights import weights


def scheduled_sparsity(progress: float, *, schedule: str, initial: float, final: float) -> float:
    """Sparsity after `progress` (0 to 1) of the schedule.

    cubic: s_f + (s_i - s_f)(1 - progress)^3 (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878); linear: the
    straight line;
    constant: s_f from the start.
    """
    progress = min(1.0, max(0.0, progress))
    left = {"cubic": (1 - progress) ** 3, "linear": 1 - progress, "constant": 0.0}[schedule]
    return final + (initial - final) * left


@dataclass(eq=False)
class Pruning(Technique):
    """``Pruning(sparsity=0.5, pattern="2:4")``: masks over every attention, FFN and expert matrix.

    A mask is chosen by the criterion among what is left, so masks are nested, and is applied to the weights and to
    the optimizer's moments after every optimizer step. With ``schedule="constant", begin=0`` an already pruned model
    keeps exactly its zeros.
    """

    sparsity: float = field(default=0.5, metadata={"help": "share of each matrix that ends as zero"})
    pattern: str = field(default="unstructured", metadata={"help": "unstructured, or N:M along the inputs (2:4)"})
    criterion: str = field(
        default="magnitude", metadata={"help": "importance of a weight: see `hf-compress list criteria`"}
    )
    schedule: str = field(default="cubic", metadata={"help": "cubic, linear or constant"})
    initial_sparsity: float = field(default=0.0, metadata={"help": "sparsity where the schedule begins"})
    begin: float = field(default=0.0, metadata={"help": "where the schedule begins, as a share of all steps"})
    end: float = field(default=0.75, metadata={"help": "where it ends; the rest of the run recovers"})
    every: int = field(default=10, metadata={"help": "steps between two mask updates"})
    skip: list[str] = field(default_factory=list, metadata={"help": "regular expressions of weights to leave dense"})

    def check(self) -> None:
        check_target(self.sparsity, self.pattern)
        entry = criteria.entry(self.criterion, where="prune.criterion")
        if entry.traits["needs"]:
            raise CompressError(
                f"{self.criterion!r} needs calibration statistics, which a training run does not collect",
                where="prune.criterion",
                next_step="use magnitude here",
            )
        if self.schedule not in ("cubic", "linear", "constant"):
            raise CompressError(
                f"unknown schedule {self.schedule!r}", where="prune.schedule", next_step="cubic, linear or constant"
            )
        if not (0 <= self.begin <= self.end <= 1 and self.begin < 1 and self.every > 0):
            raise CompressError("0 <= begin <= end <= 1, begin below 1 and every above 0", where="prune")

    def attach(self, model: nn.Module) -> None:
        if hasattr(model, "peft_config"):
            raise CompressError(
                "a mask must hold on W + BA, and adapters are merged after training",
                where="prune",
                next_step="train the whole weights under a mask, or prune after merging",
            )
        self._weights = [w for w in weights(model) if not any(re.search(pattern, w.name) for pattern in self.skip)]
        for weight in self._weights:
            mask_of(
                torch.zeros(1, weight.matrix.shape[1]), sparsity=self.sparsity, pattern=self.pattern
            )  # N:M must divide the inputs
        self._masks: dict[str, Tensor] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        first, last = int(self.begin * state.max_steps), self._last(state.max_steps)
        step = state.global_step
        if (
            step < first
            or (self._masks and step > last)
            or (self._masks and (step - first) % self.every and step != last)
        ):
            return
        if self.schedule == "constant" and self._masks:
            return
        progress = 1.0 if step >= last else (step - first) / (last - first)
        sparsity = scheduled_sparsity(
            progress, schedule=self.schedule, initial=self.initial_sparsity, final=self.sparsity
        )
        score, group = criteria[self.criterion], criteria.entry(self.criterion).traits["group"]
        self._masks = {
            w.name: mask_of(score(w.matrix, Statistics()), sparsity=sparsity, pattern=self.pattern, group=group)
            for w in self._weights
        }
        self._apply(kwargs.get("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._apply(kwargs.get("optimizer"))

    @torch.no_grad()
    def _apply(self, optimizer: torch.optim.Optimizer | None) -> None:
        for weight in self._weights if self._masks else []:
            mask = self._masks[weight.name]
            weight.matrix.masked_fill_(~mask, 0)
            for moment in (optimizer.state.get(weight.whole, {}) if optimizer is not None else {}).values():
                if isinstance(moment, Tensor) and moment.shape == weight.whole.shape:
                    weight.of(moment).masked_fill_(~mask, 0)

    def settled(self, step: int, max_steps: int) -> bool:
        return step > self._last(max_steps)

    def _last(self, max_steps: int) -> int:
        """The step before which the final mask is chosen; at least one step trains under it."""
        return min(int(self.end * max_steps), max_steps - 1)

    def state(self) -> dict[str, Tensor]:
        return {name: _packed(mask) for name, mask in self._masks.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if state and set(state) != {w.name for w in self._weights}:
            raise CompressError(
                "the checkpoint's masks are of other weights",
                where="resume",
                next_step="resume with the recipe that was interrupted",
            )
        self._masks = (
            {w.name: _unpacked(state[w.name], w.shape).to(w.whole.device) for w in self._weights} if state else {}
        )

    def finalize(self, model: nn.Module) -> None:
        if not self._masks:
            raise CompressError(
                "the run ended before pruning began", where="prune.begin", next_step="lower begin, or train longer"
            )
        self._apply(None)

    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in sorted(self._masks):
            digest.update(_packed(self._masks[name]).numpy().tobytes())
        zeros = sum(int((~m).sum()) for m in self._masks.values())
        return {
            "pattern": self.pattern,
            "criterion": self.criterion,
            "schedule": self.schedule,
            "target": self.sparsity,
            "sparsity": zeros / max(1, sum(m.numel() for m in self._masks.values())),
            "weights": len(self._masks),
            "masks_sha256": digest.hexdigest(),
        }


def _packed(mask: Tensor) -> Tensor:
    """One bit a weight: (ceil(n / 8),) uint8."""
    bits = torch.nn.functional.pad(mask.flatten().cpu().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    if bits.numel() - shape[0] * shape[1] not in range(8):
        raise CompressError("a mask in the checkpoint does not fit its weight", where="resume")
    return bits.flatten()[: shape[0] * shape[1]].bool().view(shape)
