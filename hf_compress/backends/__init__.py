"""Containers: each function writes a checkpoint that plain from_pretrained opens, and says what it could not store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration import Batch
from hf_compress.coverage import Coverage
from hf_compress.environments import Say, environment
from hf_compress.errors import CompressError
from hf_compress.registry import Registry
from hf_compress.verification import write_expectation, write_hashes


@dataclass(frozen=True)
class Written:
    """model: what the folder reloads as; None when only another environment opens it, which then answered for it.
    coverage: what is stored in fewer bits, counted in the written model. facts: what the library measured."""

    model: PreTrainedModel | None
    coverage: Coverage
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


Backend = Callable[..., Written]
"""``backend(model, tokenizer, folder, *, bits, group_size, **options) -> Written``.

Traits, shown by `plan` and the card: disk, memory, speed, experts, serves, needs (sentences). Functions:
``check(*, bits, group_size, **options)`` raises for what the container does not have, before any model is read;
``stores(weight, *, bits, group_size)``: bytes on disk as a float, or the reason (str) why this weight stays as it is;
``packing(model, *, bits, group_size, **options)``, where weights can be packed one by one: an `oneshot.Container`.
environment: name of the one its library lives in (`hf_compress.environments`); such a backend takes ``calibration``
(batches) and writes the expectation of `verify` itself.
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
    scales: Mapping[str, Tensor] | None = None,
    calibration: Sequence[Batch] | None = None,
    say: Say = lambda _: None,
    **options: Any,
) -> Written:
    """``quantize(model, "out", backend="compressed-tensors", bits=4, group_size=32, tokenizer=tokenizer)``: write a
    folder that plain from_pretrained opens and `verify` can check.

    `options` are the backend's own (``hf-compress list backends``); scales: weight name -> (out, groups), where a
    solver chose the grid (`OneshotReport.scales`; backends with a `packing`). calibration: batches, for a backend that
    calibrates itself (gptq); say: told what it does. Look at `Written.coverage`: what the
    container cannot store stays as it was.

    Raises:
        CompressError: unknown backend; the folder exists; bits or group sizes the container does not have.
    """
    folder = Path(folder)
    if folder.exists():
        raise CompressError("the output folder exists", where=str(folder), next_step="choose another")
    entry, part = backends.entry(backend), folder.with_name(folder.name + ".part")
    entry.traits["check"](bits=bits, group_size=group_size, **options)
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Any] = {} if scales is None else {"scales": scales}
    if "environment" in entry.traits:
        environment(entry.traits["environment"]).require(what=f"backend {backend}", where="quantize")
        chosen |= {"calibration": calibration, "say": say}
    try:
        written = entry.value(model, tokenizer, part, bits=bits, group_size=group_size, **options, **chosen)
        if written.model is not None:
            write_expectation(written.model, part)
        write_hashes(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return written
