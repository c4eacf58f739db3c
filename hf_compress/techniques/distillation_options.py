"""Which options of `Distillation` go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.heads import head_of
from hf_compress.losses import losses
from hf_compress.techniques.features import check_features
from hf_compress.techniques.ramp import RAMPS
from hf_compress.techniques.teacher import OPTIONS

if TYPE_CHECKING:
    from hf_compress.techniques.distillation import Distillation


def check_options(given: Distillation) -> None:
    """Raise a CompressError for what cannot work whatever the models: no teacher or too many, losses of another kind,
    numbers out of range."""
    if given.teacher_cache is not None:
        _check_cached(given)
    elif bool(given.teachers) == (given.teacher_model is not None):
        raise CompressError(
            "distillation needs a teacher" if not given.teachers else "teacher_model and teachers are both given",
            where="distill.teacher_model",
            next_step="a folder, a Hub id, or `dense` in a recipe; or a list of them as `teachers`",
        )
    loss = losses.entry(given.loss, where="distill.loss")
    if loss.traits["kind"] not in ("logits", "values"):
        raise CompressError(
            f"{given.loss!r} is not a logit loss",
            where="distill.loss",
            next_step=f"features: {{{given.loss}: 1.0}}",
        )
    certain = torch.zeros(1, 1)  # one class: the loss itself says whether its options are in range
    loss.value(certain, certain.clone(), **{name: getattr(given, name) for name in loss.traits.get("options", ())})
    check_features(given.features)
    for key in given.teacher_model_init_kwargs:
        if key not in OPTIONS:
            raise CompressError(
                f"the teacher cannot be loaded with {key!r}",
                where="distill.teacher_model_init_kwargs",
                next_step="allowed: " + ", ".join(OPTIONS),
            )
    weights = given.teacher_weights
    wrong = {
        "temperature": (f"{given.temperature} is not positive", not given.temperature > 0),
        "weight_schedule": (
            f"{given.weight_schedule!r} is not one of {', '.join(RAMPS)}",
            given.weight_schedule not in RAMPS,
        ),
        "taid": (f"{given.taid} is not between 0 and 1", given.taid is not None and not 0 <= given.taid <= 1),
        "lmbda": (f"{given.lmbda} is not between 0 and 1", not 0 <= given.lmbda <= 1),
        "teacher_bits": (
            f"bitsandbytes has 8 and 4, not {given.teacher_bits}",
            given.teacher_bits not in (None, 4, 8),
        ),
        "chunk_size": (
            f"{given.chunk_size} is no number of positions",
            given.chunk_size is not None and given.chunk_size < 1,
        ),
        "teacher_weights": (
            f"{weights} are not one positive number for each of {len(given.teachers)} teachers",
            bool(weights) and (len(weights) != len(given.teachers) or min(weights) <= 0),
        ),
    }
    for name, (what, is_so) in wrong.items():
        if is_so:
            raise CompressError(f"{name} {what}", where=f"distill.{name}")


def check_student(given: Distillation, student: PreTrainedModel) -> None:
    """Raise a CompressError for what a model of its kind cannot learn."""
    causal = head_of(student) == "causal"
    wrong = {
        "teacher_cache": ("only causal language models have a cache", given.teacher_cache is not None and not causal),
        "lmbda": ("only causal language models go on with a text", bool(given.lmbda) and not causal),
        "features": (
            "an encoder-decoder has two stacks of blocks, and features are about one",
            bool(given.features) and student.config.is_encoder_decoder,
        ),
    }
    for name, (what, is_so) in wrong.items():
        if is_so:
            raise CompressError(
                what, where=f"distill.{name}", next_step="learn from a teacher in memory, by its logits alone"
            )


def _check_cached(given: Distillation) -> None:
    wrong = {
        "features need a teacher's blocks, and a cache holds its answers only": bool(given.features),
        f"a cache of sampled answers gives forward_kl, not {given.loss}": given.loss != "forward_kl",
        "a cache has one teacher": bool(given.teachers),
        "a cache knows nothing of what the student writes (lmbda)": bool(given.lmbda),
        "a cache of sampled answers cannot be mixed with the student's (taid)": given.taid is not None,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise CompressError(what, where="distill.teacher_cache", next_step="use the teacher itself")
