"""When masks are chosen, and how many zeros they then have: from a run's length to steps and sparsities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_compress.errors import CompressError, did_you_mean

SCHEDULES = {
    "cubic": "fast first, then slower",
    "linear": "in equal steps",
    "oneshot": "all at once where it begins",
    "iterative": "in cycles of pruning and retraining",
    "constant": "the zeros that the model already has",
}
When = float | str
"""A moment of a run: below 1 a share of all steps, 1 the end, above 1 steps; or ``"200 steps"``, ``"2 epochs"``."""


def parse_when(when: When, *, where: str) -> tuple[float, str]:
    """Number and unit: ``share`` of all steps, ``steps`` or ``epochs``.

    Raises:
        CompressError: anything else, negative numbers, a part of a step.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?)?\s*", str(when))
    if found is not None:
        number, unit = float(found[1]), (found[2] or "").rstrip("s")
        kind = "epochs" if unit == "epoch" else "steps" if unit == "step" or number > 1 else "share"
        if kind != "steps" or number.is_integer():
            return number, kind
    raise CompressError(
        f"{when!r} is no moment of a run",
        where=where,
        next_step="a share of all steps (0.75), a number of steps (200 or '200 steps'), or '2 epochs'",
    )


def steps_of(when: When, *, total: int, epoch: int | None, where: str) -> int:
    """A moment in optimizer steps. total: steps of the run; epoch: steps of one, None where rows are streamed.

    Raises:
        CompressError: as `parse_when`; epochs of streamed rows.
    """
    number, unit = parse_when(when, where=where)
    if unit == "epochs" and epoch is None:
        raise CompressError(
            "the rows are streamed, so an epoch has no known length", where=where, next_step="say it in steps"
        )
    return int(number * {"share": total, "steps": 1, "epochs": epoch or 0}[unit] + 1e-9)


def steps_in_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Optimizer steps of one epoch; None for a stream."""
    try:
        batches: int = len(dataloader)
    except TypeError:
        return None
    accumulated: int = args.gradient_accumulation_steps
    return max(1, -(-batches // accumulated))


def scheduled_sparsity(progress: float, *, schedule: str, initial: float, final: float) -> float:
    """Sparsity after `progress` (0 to 1) of the schedule.

    cubic: s_f + (s_i - s_f)(1 - progress)^3 (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878); linear and
    iterative: the straight line; oneshot and constant: s_f from the start.
    """
    progress = min(1.0, max(0.0, progress))
    straight = 1 - progress
    left = {"cubic": straight**3, "linear": straight, "iterative": straight, "oneshot": 0.0, "constant": 0.0}[schedule]
    return final + (initial - final) * left


@dataclass(frozen=True)
class Plan:
    """Masks are chosen before the steps of which `due` is true; `last` is the last of them.

    `rewind` is the step whose weights survivors go back to, None to train on.
    """

    schedule: str
    first: int
    last: int
    every: int
    cycles: int = 1
    rewind: int | None = None

    @classmethod
    def of(
        cls,
        state: TrainerState,
        epoch: int | None,
        *,
        schedule: str,
        begin: When,
        end: When,
        every: When,
        cycles: int | None,
        rewind_to: When | None,
        waits: bool,
    ) -> Plan:
        """For one run. waits: the criterion looks at steps that must come first.

        Raises:
            CompressError: it begins after the run or after it ends; a step between updates is none; cycles that do
            not fit; weights to go back to that are younger than the first mask.
        """
        total = state.max_steps

        def at(when: When, where: str) -> int:
            return steps_of(when, total=total, epoch=epoch, where=f"prune.{where}")

        first = max(at(begin, "begin"), int(waits))
        last = first if schedule in ("oneshot", "constant") else min(at(end, "end"), total - 1)
        every_number, unit = parse_when(every, where="prune.every")
        interval = int(every_number) if unit == "share" and every_number == 1 else at(every, "every")
        rewind = None if rewind_to is None else at(rewind_to, "rewind_to")
        wrong = {
            f"pruning begins at step {first}, and the run has {total}": first >= total,
            f"the schedule begins at step {first} and ends at step {last}": last < first,
            f"{every} is less than a step between two masks": interval < 1,
            f"{cycles} cycles do not fit between step {first} and step {last}": last - first < (cycles or 1) - 1,
            f"step {rewind}, to go back to, is after step {first}, where pruning begins": (rewind or 0) > first,
        }
        for what, is_so in wrong.items():
            if is_so:
                raise CompressError(what, where="prune", next_step="change begin, end, every or the run's length")
        return cls(schedule, first, last, interval, cycles or 1, rewind)

    @property
    def _events(self) -> list[int]:
        """Of the iterative schedule: evenly from first to last."""
        gaps = max(1, self.cycles - 1)
        return [self.first + round(k * (self.last - self.first) / gaps) for k in range(self.cycles)]

    def due(self, step: int) -> bool:
        if self.schedule == "iterative":
            return step in self._events
        inside = self.first <= step <= self.last
        return inside and ((step - self.first) % self.every == 0 or step == self.last)

    def sparsity(self, step: int, *, initial: float, final: float) -> float:
        """After the masks that are chosen before `step`."""
        if self.schedule == "iterative":
            progress = (self._events.index(step) + 1) / self.cycles
        else:
            progress = 1.0 if step >= self.last else (step - self.first) / (self.last - self.first)
        return scheduled_sparsity(progress, schedule=self.schedule, initial=initial, final=final)


def check_schedule(schedule: str) -> None:
    """Raise a CompressError for one that does not exist."""
    if schedule not in SCHEDULES:
        raise CompressError(
            f"unknown schedule {schedule!r}", where="prune.schedule", next_step=did_you_mean(schedule, SCHEDULES)
        )
