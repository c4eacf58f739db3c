"""Which options of `Distillation` go together."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.heads import head_of
from hf_compress.losses import losses
from hf_compress.source import is_missing_folder, local_path
from hf_compress.techniques.features import check_features
from hf_compress.techniques.ramp import RAMPS
from hf_compress.techniques.teacher import BASE, OPTIONS

if TYPE_CHECKING:
    from hf_compress.techniques.distillation import Distillation


def check_options(given: Distillation) -> None:
    """Raise a CompressError for what cannot work whatever the models: values of another type, no teacher or too many,
    losses of another kind, numbers out of range, options that nothing would use."""
    _check_types(given)
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
    named = [] if given.teacher_cache is not None else [*given.teachers, given.teacher_model]
    read = [name for name in named if isinstance(name, str) and name != BASE]
    wrong = {
        "weight": (f"{given.weight} is negative", not given.weight >= 0),
        "weight_end": (f"{given.weight_end} is negative", given.weight_end is not None and not given.weight_end >= 0),
        "layer_map": ("is about features, and there are none", given.layer_map is not None and not given.features),
        "temperature": (f"{given.temperature} is not positive", not given.temperature > 0),
        "weight_schedule": (
            f"{given.weight_schedule!r} is not one of {', '.join(RAMPS)}",
            given.weight_schedule not in RAMPS,
        ),
        "taid": (f"{given.taid} is not between 0 and 1", given.taid is not None and not 0 <= given.taid <= 1),
        "lmbda": (f"{given.lmbda} is not between 0 and 1", not 0 <= given.lmbda <= 1),
        "teacher_bits": (
            "is for a teacher that is read here: not for a cache, a loaded model or `base`"
            if not read
            else f"bitsandbytes has 8 and 4, not {given.teacher_bits}",
            given.teacher_bits is not None and (not read or given.teacher_bits not in (4, 8)),
        ),
        "chunk_size": (
            f"{given.chunk_size} is no number of positions",
            given.chunk_size is not None and given.chunk_size < 1,
        ),
        "chunked": ("is false, so chunk_size would do nothing", given.chunk_size is not None and not given.chunked),
        "teacher_weights": (
            f"{weights} are not one positive number for each of {len(given.teachers)} teachers",
            bool(weights) and (len(weights) != len(given.teachers) or min(weights) <= 0),
        ),
    }
    for name, (what, is_so) in wrong.items():
        if is_so:
            raise CompressError(f"{name} {what}", where=f"distill.{name}")
    for name in read:
        if is_missing_folder(local_path(name)):
            raise CompressError("no such folder", where=f"distill.teacher_model {name!r}", next_step="check the path")


def _check_types(given: Distillation) -> None:
    """Annotations bind nobody in a script, and what they would have caught fails deep inside, or means another
    thing."""
    hints = get_type_hints(type(given))
    for name in (field.name for field in fields(given)):
        kind, value = hints[name], getattr(given, name)
        if name == "teachers" and isinstance(value, list):
            value = [None if isinstance(teacher, nn.Module) else teacher for teacher in value]
            kind = list[str | None]
        if name == "teacher_model" and isinstance(value, nn.Module):
            continue
        try:
            TypeAdapter(kind).validate_python(list(value) if isinstance(value, tuple) else value, strict=True)
        except ValidationError as error:
            raise CompressError(f"{error.errors()[0]['msg']} (got {value!r})", where=f"distill.{name}") from error


def check_task_weight(given: Distillation, task_weight: float) -> None:
    """Raise a CompressError for a task weight that does not go with the rest of the loss."""
    if given.lmbda and task_weight:
        raise CompressError(
            "the student's own text has no labels to learn a task from",
            where="distill.lmbda",
            next_step="set task_weight: 0, or lmbda: 0",
        )
    if not task_weight >= 0 or not (task_weight or given.weight or given.weight_end or given.features):
        raise CompressError(
            "there is nothing to learn" if task_weight == 0 else f"task_weight {task_weight} is negative or no number",
            where="task_weight",
            next_step="give task_weight, distill.weight or distill.features a weight above 0",
        )


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
