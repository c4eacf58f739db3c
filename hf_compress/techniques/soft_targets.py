"""From outputs of student and teachers to the loss of each position and its gradient, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses

BLOCK_BYTES = 2 * 2**20  # of one fp32 (rows, classes) buffer: what is computed with it stays in a CPU's cache

Rows = Callable[[Tensor], Tensor]
"""Indexes of rows -> outputs (rows, classes) of them."""


class Teacher(Protocol):
    """What the teacher says of some rows, whatever form it is kept in."""

    @property
    def weight(self) -> float: ...

    def chunk(self, rows: Tensor) -> None:
        """The next rows, by index: fetch what is known of them."""

    def block(self, block: slice) -> None:
        """Those rows of the chunk that `learn` and `compare` are about."""

    def learn(self, student: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
        """Student's outputs (rows, classes) -> value (rows,) and its gradient (rows, classes)."""

    def compare(self, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) at temperature 1, and whether the likeliest class is the same; (rows,) each."""


@dataclass(frozen=True)
class SoftTargets:
    """A loss of `hf_compress.losses` with its options. KLs at temperature T are multiplied by T^2 (a loss of order 1
    by T), so that their gradient keeps its size (https://arxiv.org/abs/1503.02531). share: below 1 the target's logits
    are (1 - share) student + share teacher, the student's without gradient (TAID, https://arxiv.org/abs/2501.16937)."""

    loss: str
    temperature: float = 1.0
    options: dict[str, float] = field(default_factory=dict)
    share: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 outputs (rows, classes) twice -> value (rows,), d value / d student (rows, classes)."""
        entry = losses.entry(self.loss)
        if self.share < 1:
            teacher = student.lerp(teacher, self.share)
        if entry.traits["kind"] == "values":
            value, gradient = entry.value(student, teacher)
            return value, gradient
        log_q = (student / self.temperature).log_softmax(-1)
        log_p = (teacher / self.temperature).log_softmax(-1)
        value, slope = entry.value(log_q, log_p, **self.options)
        total = slope.sum(-1, keepdim=True)
        gradient = slope.addcmul_(log_q.exp_(), total, value=-1)  # through log-softmax: slope - q * sum(slope)
        order: int = entry.traits["order"]
        return value * self.temperature**order, gradient.mul_(self.temperature ** (order - 1))


@dataclass
class Online:
    """A teacher whose outputs are there now. shape: what turns them, as fp32 and in place, into logits."""

    outputs: Rows
    weight: float = 1.0
    shape: Callable[[Tensor], Tensor] = lambda logits: logits

    def chunk(self, rows: Tensor) -> None:
        self._chunk = self.outputs(rows)

    def block(self, block: slice) -> None:
        self._block = self.shape(self._chunk[block].float())

    def learn(self, student: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
        ours, theirs = _common(student, self._block)
        value, gradient = soft(ours, theirs)
        if not torch.isfinite(value.sum()) and not torch.isfinite(theirs).all():
            raise CompressError(
                "the teacher's logits are not finite",
                where="distillation",
                next_step="check the teacher's dtype and inputs",
            )
        return value, as_wide_as(student, gradient)

    def compare(self, log_q: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = _common(log_q, self._block)
        log_p = theirs.log_softmax(-1)
        kl = torch.linalg.vecdot(log_p.exp(), log_p - ours.log_softmax(-1))
        return kl, (ours.argmax(-1) == log_p.argmax(-1)).float()


def _common(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The classes both have: vocabularies may be padded to different sizes."""
    common = min(ours.shape[-1], theirs.shape[-1])
    return ours[:, :common], theirs[:, :common]


def as_wide_as(student: Tensor, gradient: Tensor) -> Tensor:
    """No gradient for classes that the student alone has."""
    missing = student.shape[-1] - gradient.shape[-1]
    return torch.nn.functional.pad(gradient, (0, missing)) if missing else gradient


@dataclass(frozen=True)
class Objective:
    """What is learned at each row: the task's labels and the teachers' answers.

    soft_weight, task_weight: of the two parts in the total. labels: (rows,), None where the model makes the task loss
    itself. measure: also compare with the first teacher.
    """

    soft: SoftTargets
    teachers: Sequence[Teacher]
    soft_weight: float = 1.0
    task_weight: float = 0.0
    labels: Tensor | None = None
    measure: bool = False

    def __call__(self, student: Tensor, rows: Tensor, block: slice) -> tuple[Tensor, Tensor | None]:
        """fp32 outputs (rows, classes) of the rows of a block -> sums (4,) of task, soft loss, KL and agreement (the
        last two only when measured); d (task_weight * task + soft_weight * soft) / d outputs, None where nothing is
        learned."""
        sums = student.new_zeros(4)
        total: Tensor | None = None
        for teacher in self.teachers:
            teacher.block(block)
            if self.soft_weight:
                value, gradient = teacher.learn(student, self.soft)
                sums[1] += teacher.weight * value.sum()
                gradient = gradient.mul_(self.soft_weight * teacher.weight)
                total = gradient if total is None else total.add_(gradient)
        if self.labels is not None or self.measure:
            log_q = student.log_softmax(-1)
            if self.measure:
                kl, same = self.teachers[0].compare(log_q)
                sums[2] += kl.sum()
                sums[3] += same.sum()
            if self.labels is not None:
                labels = self.labels[rows].unsqueeze(-1)
                sums[0] -= log_q.gather(-1, labels).sum()
                if self.task_weight:
                    gradient = log_q.exp_().mul_(self.task_weight)
                    gradient.scatter_add_(-1, labels, torch.full_like(labels, -self.task_weight, dtype=gradient.dtype))
                    total = gradient if total is None else total.add_(gradient)
        return sums, total

    def start(self, rows: Tensor) -> None:
        """The next chunk of rows."""
        for teacher in self.teachers:
            teacher.chunk(rows)


def rows_in(size: int, classes: int) -> int:
    """How many rows of fp32 `classes` fit in `size` bytes."""
    return max(1, size // (4 * classes))


class FromOutputs(torch.autograd.Function):
    """(total, sums) of an objective over `rows` of outputs that the model made; the gradient is made in forward, in
    the dtype of the outputs: the one tensor of their size that backward needs anyway."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, rows: Tensor, objective: Objective) -> tuple[Tensor, ...]:
        gradient = torch.zeros_like(outputs) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(4, device=outputs.device)
        for part in rows.split(rows_in(BLOCK_BYTES * (1 if rows.is_cpu else 16), outputs.shape[-1])):
            objective.start(part)
            more, slope = objective(outputs[part].float(), part, slice(None))
            sums += more
            if gradient is not None and slope is not None:
                gradient[part] = slope.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return objective.soft_weight * sums[1] + objective.task_weight * sums[0], sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None
