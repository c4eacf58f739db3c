"""Write a copy for another runtime (ONNX Runtime, OpenVINO) beside the plain checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hf_compress.backends.elsewhere import FORMATS, export_elsewhere
from hf_compress.backends.onnx import export_onnx
from hf_compress.errors import CompressError, did_you_mean, require
from hf_compress.stages.base import Done, Stage, Work

QUANTIZE = {"onnx": ("int8", "int8-static", None)} | {name: known.quantize for name, known in FORMATS.items()}


@dataclass
class Export(Stage):
    """``export: {format: onnx, quantize: int8}``"""

    format: str = field(
        default="onnx",
        metadata={
            "help": "onnx (encoders); optimum-onnx (decoders with their cache too, needs `hf-compress env add onnx`); "
            "openvino (needs `hf-compress env add openvino`)"
        },
    )
    quantize: str | None = field(
        default="int8",
        metadata={
            "help": "int8 (onnx: activations rounded as they come; openvino: weights), int8-static (any format: "
            "activations in ranges seen in `samples` rows), int4 (weights; openvino), or none for fp32"
        },
    )
    group_size: int = field(default=32, metadata={"help": "weights that share a scale in int4"})
    samples: int = field(default=128, metadata={"help": "rows of training text that int8-static calibrates on"})

    def check(self, work_kinds: list[str], *, where: str) -> None:
        if self.format not in QUANTIZE:
            raise CompressError(
                f"unknown export format {self.format!r}",
                where=f"{where}.format",
                next_step=did_you_mean(self.format, QUANTIZE),
            )
        if self.quantize not in QUANTIZE[self.format]:
            raise CompressError(
                f"{self.format} has no {self.quantize!r}",
                where=f"{where}.quantize",
                next_step="known: " + ", ".join(str(name or "none") for name in QUANTIZE[self.format]),
            )
        if "quantize" in work_kinds:
            raise CompressError(
                "export needs floating weights",
                where=where,
                next_step="put export before quantize: the file stays beside the final checkpoint",
            )
        if self.format == "onnx":
            for module in ("onnx", "onnxscript", "onnxruntime"):
                require(module, extra="onnx", what="export to ONNX")
        elif self.format == "optimum-onnx":
            require("onnxruntime", extra="onnx", what="checking an ONNX file")

    def calibrates(self, model: PreTrainedModel) -> bool:
        return self.quantize == "int8-static"

    def run(self, work: Work) -> Done:
        text = self.calibrates(work.model)
        batches = work.calibration(work.model.config.vocab_size, self.samples) if text else []
        name = FORMATS[self.format].folder if self.format in FORMATS else "onnx"
        shutil.rmtree(work.folder / name, ignore_errors=True)  # of a run that was interrupted when it had its name
        if self.format == "onnx":
            facts = export_onnx(work.model, work.folder, quantize=self.quantize, batches=batches)
            return Done(work.model, facts, extras={name: work.folder / name}, scales=work.scales)
        facts = export_elsewhere(
            work.model,
            work.folder,
            format=self.format,
            quantize=self.quantize,
            group_size=self.group_size,
            calibration=batches,
            say=work.say,
        )
        return Done(work.model, facts, extras={name: work.folder / name}, scales=work.scales)
