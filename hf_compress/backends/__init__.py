"""Containers: each function writes a checkpoint that plain from_pretrained opens, and says what it could not store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.coverage import Coverage
from hf_compress.errors import CompressError
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


def quantize(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    backend: str = "bitsandbytes",
    bits: int = 8,
    group_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Written:
    """``quantize(model, "out", backend="compressed-tensors", bits=4, group_size=32)``: write a folder that plain
    from_pretrained opens.

    `options` are the backend's own (``hf-compress list backends``). Look at `Written.coverage`: what the container
    cannot store stays as it was.

    Raises:
        CompressError: unknown backend; the folder exists; bits or group sizes the container does not have.
    """
    folder = Path(folder)
    if folder.exists():
        raise CompressError("the output folder exists", where=str(folder), next_step="choose another")
    return backends[backend](model, tokenizer, folder, bits=bits, group_size=group_size, **options)
