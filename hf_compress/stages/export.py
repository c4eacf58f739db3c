"""Write a copy for another runtime (ONNX Runtime int8) beside the plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.backends.onnx import check, export_onnx
from hf_compress.errors import CompressError, require
from hf_compress.stages.base import Done, Stage, Work


@dataclass
class Export(Stage):
    """``export: {format: onnx, quantize: int8}``"""

    format: str = field(default="onnx", metadata={"help": "onnx"})
    quantize: str | None = field(
        default="int8",
        metadata={"help": "int8 (dynamic: activations rounded as they come), static (in ranges seen before), or none"},
    )
    samples: int = field(default=128, metadata={"help": "rows of training text that static ranges are taken from"})

    def check(self, work_kinds: list[str], *, where: str) -> None:
        if self.format != "onnx":
            raise CompressError(
                f"unknown export format {self.format!r}", where=f"{where}.format", next_step="known: onnx"
            )
        try:
            check(self.quantize)
        except CompressError as error:
            raise CompressError(error.what, where=f"{where}.quantize", next_step=error.next_step) from error
        if "quantize" in work_kinds:
            raise CompressError(
                "ONNX export needs floating weights",
                where=where,
                next_step="put export before quantize: the file stays beside the final checkpoint",
            )
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, extra="onnx", what="export to ONNX")

    def run(self, work: Work) -> Done:
        static = self.quantize == "static"
        batches = work.calibration(work.model.config.vocab_size, self.samples) if static else []
        facts = export_onnx(work.model, work.folder, quantize=self.quantize, batches=batches)
        return Done(work.model, facts, extras={"onnx": work.folder / "onnx"})
