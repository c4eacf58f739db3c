"""Write a copy for another runtime (ONNX Runtime int8) beside the plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_compress.backends.onnx import export_onnx
from hf_compress.errors import CompressError, require
from hf_compress.stages.base import Done, Stage, Work


@dataclass
class Export(Stage):
    """``export: {format: onnx, quantize: int8}``"""

    format: str = field(default="onnx", metadata={"help": "onnx"})
    quantize: str | None = field(default="int8", metadata={"help": "int8 (dynamic), or none for fp32"})

    def check(self, work_kinds: list[str], *, where: str) -> None:
        if self.format != "onnx":
            raise CompressError(
                f"unknown export format {self.format!r}", where=f"{where}.format", next_step="known: onnx"
            )
        if "quantize" in work_kinds:
            raise CompressError(
                "ONNX export needs floating weights",
                where=where,
                next_step="put export before quantize: the file stays beside the final checkpoint",
            )
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, extra="onnx", what="export to ONNX")

    def run(self, work: Work) -> Done:
        facts = export_onnx(work.model, work.folder, quantize=self.quantize)
        return Done(work.model, facts, extras={"onnx": work.folder / "onnx"}, scales=work.scales)
