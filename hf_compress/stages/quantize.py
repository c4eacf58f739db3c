"""Store the weights in fewer bits, in a container that plain from_pretrained opens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from hf_compress.backends import backends
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.stages.base import Done, Stage, Work


@dataclass
class Quantize(Stage):
    """``quantize: {backend: bitsandbytes, bits: 8}``"""

    backend: str = field(default="bitsandbytes", metadata={"help": "container: see `hf-compress list backends`"})
    bits: int = field(default=8, metadata={"help": "bits a weight"})
    group_size: int | None = field(
        default=None, metadata={"help": "weights that share a scale along the inputs; none = a whole row"}
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further options of the backend (dtype, quant_type, double_quant)"}
    )
    min_coverage: float = field(
        default=0.99, metadata={"help": "fail when less of the weights, or of the experts, is stored in these bits"}
    )

    def check(self, work_kinds: list[str], *, where: str) -> None:
        try:
            backends.entry(self.backend)
        except CompressError as error:
            raise CompressError(error.what, where=f"{where}.backend", next_step=error.next_step) from error
        known = set(inspect.signature(backends[self.backend]).parameters) - {
            "model",
            "tokenizer",
            "folder",
            "bits",
            "group_size",
        }
        for option in self.options:
            if option not in known:
                raise CompressError(
                    f"{self.backend} has no option {option!r}",
                    where=f"{where}.options",
                    next_step=did_you_mean(option, known),
                )
        if "quantize" in work_kinds:
            raise CompressError("the weights are quantized already", where=where, next_step="keep one quantize stage")

    def run(self, work: Work) -> Done:
        saved = work.folder / "quantized"
        written = backends[self.backend](
            work.model, work.tokenizer, saved, bits=self.bits, group_size=self.group_size, **self.options
        )
        written.coverage.require(self.min_coverage, where=f"quantize ({self.backend}, {self.bits} bits)")
        return Done(written.model, {"notes": written.notes}, written.coverage, saved, quantized=self.backend)
