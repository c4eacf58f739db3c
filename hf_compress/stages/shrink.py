"""Remove FFN channels and whole layers for real; the config changes with them, so stock classes load the result."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.coverage import coverage
from hf_compress.errors import CompressError
from hf_compress.stages.base import Done, Stage, Work, refuse_late
from hf_compress.surgery import shrink
from hf_compress.weights import weights


@dataclass
class Shrink(Stage):
    """``shrink: {layers: [0, 2, 3, 5], ffn: 768}``"""

    ffn: int | float | None = field(
        default=None, metadata={"help": "FFN channels to keep in every layer: a number, or a share below 1"}
    )
    layers: list[int] | int | float | None = field(
        default=None, metadata={"help": "layers to keep: a list of indexes, a number, or a share below 1"}
    )

    def check(self, work_kinds: list[str], *, where: str) -> None:
        refuse_late(work_kinds, where=where)
        if self.ffn is None and self.layers is None:
            raise CompressError("shrink removes nothing", where=where, next_step="give ffn, layers or both")
        if "quantize" in work_kinds:
            raise CompressError("packed weights cannot be cut", where=where, next_step="put shrink before quantize")

    def run(self, work: Work) -> Done:
        model = work.model
        facts = shrink(model, layers=self.layers, ffn=self.ffn)
        kinds = (
            {"ffn", "expert", "shared_expert"}
            if self.layers is None
            else {"attention", "ffn", "expert", "shared_expert"}
        )
        return Done(model, facts, coverage(model, [w.name for w in weights(model) if w.kind in kinds]))
