"""Distillation losses: pure functions from student and teacher tensors, one file each."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.registry import Registry

Loss = Callable[..., Any]
"""What a loss reads and returns is its `kind`:

logits: ``loss(log_q, log_p, **options) -> (value, slope)``; log-probabilities of student and teacher, (positions,
    classes) in fp32; value (positions,), slope = d value / d log_q (positions, classes), in closed form so that no
    graph over the vocabulary is kept. Trait `order`: the lowest power of a small difference of logits in it.
values: the same on the raw outputs, with slope = d value / d student.
hidden, router, attention, qkv, flow: ``loss(student, teacher, mask, **options) -> (batch,)``, a mean within each
    sequence, differentiated by autograd. student, teacher: (batch, positions, width); attention maps (batch, heads,
    positions, positions); of qkv and flow (what enters and leaves a block) tuples of such. mask: (batch, positions),
    True where the loss looks. Trait `project`: a learned projection may make the widths equal.

Trait `options`: the names of the options it takes.
"""

losses: Registry[Loss] = Registry("loss", __name__)


def options_of(name: str) -> dict[str, Any]:
    """What may be asked of a loss: name -> default."""
    entry = losses.entry(name)
    return {option: signature(entry.value).parameters[option].default for option in entry.traits.get("options", ())}


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """(batch, positions) -> (batch,): the mean where mask is True, 0 for a sequence without such a position."""
    return value.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)


def same_width(student: Tensor, teacher: Tensor, *, loss: str) -> None:
    """Raise a CompressError where the last dimensions differ."""
    if student.shape[-1] != teacher.shape[-1]:
        raise CompressError(
            f"{loss} compares {student.shape[-1]} of the student with {teacher.shape[-1]} of the teacher",
            where=f"distill.features.{loss}",
            next_step="take a loss that needs no equal number, such as relations, gram or cka",
        )
