"""Store the weights in fewer bits, in a container that plain from_pretrained opens."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.backends import backends, quantize
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.oneshot import Solver, compress_blocks, compress_checkpoint, empty_model, solvers
from hf_compress.oneshot.solvers import check_solver_options
from hf_compress.stages.base import Done, Stage, Work


@dataclass
class Quantize(Stage):
    """``quantize: {backend: bitsandbytes, bits: 8}``"""

    backend: str = field(default="bitsandbytes", metadata={"help": "container: see `hf-compress list backends`"})
    bits: int = field(default=8, metadata={"help": "bits a weight"})
    group_size: int | None = field(
        default=None, metadata={"help": "weights that share a scale along the inputs; none = a whole row"}
    )
    method: str | None = field(
        default=None,
        metadata={"help": "solver that rounds (see `hf-compress list solvers`); none = the container's own rounding"},
    )
    solver_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further options of the method (see its docstring)"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read and write block by block; for models larger than memory"}
    )
    samples: int = field(default=128, metadata={"help": "rows of training text to calibrate on, if the method does"})
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further options of the backend (dtype, double_quant; quant_type; activations)"},
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
            "scales",
        }
        for option in self.options:
            if option not in known:
                raise CompressError(
                    f"{self.backend} has no option {option!r}",
                    where=f"{where}.options",
                    next_step=did_you_mean(option, known),
                )
        try:
            backends.entry(self.backend).traits["check"](bits=self.bits, group_size=self.group_size, **self.options)
        except CompressError as error:
            raise CompressError(error.what, where=f"{where}.{error.where}", next_step=error.next_step) from error
        for key, asked, trait in (("method", self.method, "grid"), ("streaming", self.streaming, "packing")):
            if asked and trait not in backends.entry(self.backend).traits:
                raise CompressError(
                    f"{self.backend} rounds the whole model at once, by itself",
                    where=f"{where}.{key}",
                    next_step="leave it out, or use backend: compressed-tensors",
                )
        if self.method is not None:
            makers = [entry.name for entry in solvers if entry.traits["makes"] == "codes"]
            if self.method not in makers:
                raise CompressError(
                    f"no solver {self.method!r} for quantization",
                    where=f"{where}.method",
                    next_step=did_you_mean(self.method, makers),
                )
        check_solver_options(self.method or "rtn", self.solver_options, where=f"{where}.solver_options")
        if "quantize" in work_kinds:
            raise CompressError("the weights are quantized already", where=where, next_step="keep one quantize stage")

    def _rounding(self, default: str) -> Solver:
        grid = backends.entry(self.backend).traits["grid"](bits=self.bits, group_size=self.group_size, **self.options)
        return solvers[self.method or default](grid=grid, **self.solver_options)

    def run(self, work: Work) -> Done:
        saved = work.folder / "quantized"
        if not self.streaming:
            shutil.rmtree(saved, ignore_errors=True)  # of a run that stopped between writing it and taking it over
        where = f"quantize ({self.backend}, {self.bits} bits)"
        if self.streaming:
            rounding = self._rounding("rtn")
            empty = empty_model(Path(work.checkpoint))
            packing = backends.entry(self.backend).traits["packing"](
                empty, bits=self.bits, group_size=self.group_size, **self.options
            )
            batches = work.calibration(empty.config.vocab_size, self.samples) if rounding.needs else []
            report, covered = compress_checkpoint(Path(work.checkpoint), saved, batches, rounding, container=packing)
            covered.require(self.min_coverage, where=where)
            return Done(None, report.facts(), covered, saved, quantized=self.backend)
        scales, facts = None, dict[str, Any]()
        if self.method is not None:
            rounding = self._rounding(self.method)
            batches = work.calibration(work.model.config.vocab_size, self.samples) if rounding.needs else []
            report = compress_blocks(work.model, batches, rounding, resume_dir=work.folder / "blocks")
            scales, facts = report.scales, report.facts()
        written = quantize(
            work.model,
            saved,
            backend=self.backend,
            bits=self.bits,
            group_size=self.group_size,
            tokenizer=work.tokenizer,
            scales=scales,
            **self.options,
        )
        written.coverage.require(self.min_coverage, where=where)
        return Done(written.model, facts | {"notes": written.notes}, written.coverage, saved, quantized=self.backend)
