"""Containers: each function writes a checkpoint that plain from_pretrained opens, and says what it could not store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hf_compress.coverage import Coverage
from hf_compress.registry import Registry


@dataclass(frozen=True)
class Written:
    """model: what the folder reloads as. coverage: what is stored in fewer bits, counted in the written model."""

    model: PreTrainedModel
    coverage: Coverage
    notes: list[str] = field(default_factory=list)


Backend = Callable[..., Written]
"""``backend(model, tokenizer, folder, *, bits, group_size, **options) -> Written``.

Traits, shown by `plan` and the card: disk, memory, speed, experts, serves, needs (sentences), and ``stores(weight, *,
bits, group_size)``: bytes on disk as a float, or the reason (str) why this weight stays as it is.
"""

backends: Registry[Backend] = Registry("backend", __name__)
