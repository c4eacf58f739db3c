"""What every stage is given (`Work`) and gives back (`Done`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration import Batch, calibration_batches, tokens_in, with_continuations
from hf_compress.coverage import Coverage
from hf_compress.data import Data, Prepared, prepare
from hf_compress.errors import CompressError
from hf_compress.source import ModelSource, load_model


@dataclass
class Work:
    """The model as the previous stage left it, and what a stage may need around it.

    source: where the model is read from when it is not in memory yet. folder: scratch space of this stage, kept when
    it is interrupted.
    stages: name of each finished stage (and ``dense``) -> its checkpoint, what `teacher_model` may name.
    task: ``causal-lm`` or ``text-classification``. quantized: backend that packed the weights, "" while they are
    floating. scales: weight name -> (out, groups), where the weights lie on the grid that QAT trained. say: tells the
    person what happens.
    """

    source: ModelSource
    task: str
    tokenizer: PreTrainedTokenizerBase | None
    data: Data | None
    folder: Path
    stages: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    quantized: str = ""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None

    @cached_property
    def model(self) -> PreTrainedModel:
        """Loaded at the first use, so a stage that streams from disk never holds the whole model."""
        return load_model(self.source, seed=self.seed)[0]

    @cached_property
    def prepared(self) -> Prepared:
        """Train, evaluation and calibration sets, tokenized once."""
        if self.data is None or self.tokenizer is None:
            raise CompressError(
                "this stage needs data and a tokenizer",
                where="recipe: data",
                next_step="add a `data:` section (and `model.tokenizer`) to the recipe",
            )
        return prepare(self.data, self.tokenizer, task=self.task)

    @property
    def checkpoint(self) -> str:
        """The folder the previous stage wrote."""
        assert self.source.id is not None
        return self.source.id

    def calibration(self, vocab_size: int, samples: int, continuations: int = 0) -> list[Batch]:
        """Seeded batches of training text, and `continuations` as many rows that the model writes."""
        batches = calibration_batches(self.prepared, samples=samples, vocab_size=vocab_size, seed=self.seed)
        if not continuations:
            return batches
        saved = self.folder / "continuations.safetensors"
        return with_continuations(self.model, batches, continuations, seed=self.seed, saved=saved)


@dataclass
class Done:
    """What a stage gives back.

    model: the model as it is now, or None when it was only written to disk. saved: a checkpoint folder the stage
    wrote itself (a container), else the pipeline saves `model`. extras: folders to lie beside the final checkpoint
    (``onnx``). scales: as in `Work`, of the model as it is now.
    """

    model: PreTrainedModel | None
    facts: dict[str, Any] = field(default_factory=dict)
    coverage: Coverage | None = None
    saved: Path | None = None
    extras: dict[str, Path] = field(default_factory=dict)
    quantized: str = ""
    scales: Mapping[str, Tensor] = field(default_factory=dict)


CONTINUATIONS: dict[str, Any] = {
    "help": "how many more rows the model writes for each of `samples`, going on from its first 16 tokens (half of a "
    "shorter row): more to calibrate on where text is scarce"
}


def refuse_late(work_kinds: list[str], *, where: str) -> None:
    """Raise a CompressError when what an earlier stage wrote or measured would be of another model: a copy for another
    runtime, or what a cache costs."""
    if "cache" in work_kinds:
        raise CompressError(
            "what the cache costs was measured before this stage and would be of another model",
            where=where,
            next_step="put cache last, or just before quantize",
        )
    if "export" in work_kinds:
        raise CompressError(
            "the exported copy was written before this stage and would be of another model",
            where=where,
            next_step="put export last, or just before quantize",
        )


def facts_of_text(batches: list[Batch], continuations: int) -> dict[str, Any]:
    """What a stage calibrated on, and a note of it for the card where some of it is not the recipe's own."""
    found: dict[str, Any] = {"calibration_tokens": tokens_in(batches)}
    if continuations:
        what = "a continuation" if continuations == 1 else f"{continuations} continuations"
        note = f"calibrated on {tokens_in(batches):,} tokens: rows of text, and {what} of each that the model wrote"
        found |= {"continuations": continuations, "notes": [note]}
    return found


def check_continuations(times: int, *, streaming: bool, where: str) -> None:
    """Raise a CompressError for a `continuations` key that cannot be."""
    if type(times) is not int or times < 0:
        raise CompressError(
            f"{times!r} is no number of times that the model goes on with each row",
            where=f"{where}.continuations",
            next_step="0, or a small whole number such as 1",
        )
    if times and streaming:
        raise CompressError(
            "a model that is read block by block cannot write text",
            where=f"{where}.continuations",
            next_step="leave continuations out, or streaming",
        )


class Stage:
    """Base of the stage dataclasses; their fields are the recipe's keys."""

    def check(self, work_kinds: list[str], *, where: str) -> None:
        """Raise a CompressError for what cannot work, from the recipe alone. `work_kinds`: the kinds of the stages
        before."""

    def calibrates(self, model: PreTrainedModel) -> bool:
        """Whether it compresses `model` (on the meta device too) block by block on the recipe's text."""
        return False

    def needs_text(self, model: PreTrainedModel) -> bool:
        """Whether it reads the recipe's text at all."""
        return self.calibrates(model)

    def run(self, work: Work) -> Done:
        raise NotImplementedError
