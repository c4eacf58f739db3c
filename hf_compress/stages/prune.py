"""Set weights to zero in one shot, block by block, and refit the rest from calibration text. Makes no file smaller and
no stock runtime faster."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from hf_compress.coverage import coverage
from hf_compress.errors import CompressError, at
from hf_compress.oneshot import PruneOptions, compress_blocks, compress_checkpoint, empty_model
from hf_compress.stages.base import CONTINUATIONS, Done, Stage, Work, check_continuations, facts_of_text, refuse_late
from hf_compress.weights import weights


@dataclass
class Prune(PruneOptions, Stage):
    """``prune: {sparsity: 0.5, pattern: "2:4"}``"""

    streaming: bool = field(
        default=False, metadata={"help": "read and write block by block; for models larger than memory"}
    )
    samples: int = field(default=128, metadata={"help": "rows of training text to calibrate on"})
    continuations: int = field(default=0, metadata=CONTINUATIONS)
    min_coverage: float = field(default=0.99, metadata={"help": "fail when less of the weights is touched"})

    def check(self, work_kinds: list[str], *, where: str) -> None:
        with at(f"{where}: {{}}"):
            self.check_options()
        if self.streaming and self.whole_model:
            raise CompressError(
                "gradients and owl need the whole model in memory",
                where=f"{where}: streaming",
                next_step="leave streaming out, or use budget: uniform and a criterion without gradients",
            )
        check_continuations(self.continuations, streaming=self.streaming, where=where)
        refuse_late(work_kinds, where=where)
        if "quantize" in work_kinds:
            raise CompressError("packed weights cannot be pruned", where=where, next_step="put prune before quantize")

    def calibrates(self, model: PreTrainedModel) -> bool:
        return self.whole_model or self.solver(model, []).reads_text

    def run(self, work: Work) -> Done:
        model = empty_model(Path(work.checkpoint)) if self.streaming else work.model
        names = self.names(model)
        wanted = set(names)
        left = {w.name: "skipped by the recipe" for w in weights(model) if w.name not in wanted}
        coverage(model, names, left).require(self.min_coverage, where="prune")  # before any work
        text = self.calibrates(model)
        batches = work.calibration(model.config.vocab_size, self.samples, self.continuations) if text else []
        solver = self.solver(model, batches)
        saved = work.folder / "pruned" if self.streaming else None
        if saved is not None:
            shutil.rmtree(saved, ignore_errors=True)  # of a run that stopped between writing it and taking it over
            report, touched = compress_checkpoint(Path(work.checkpoint), saved, batches, solver, only=names)
        else:
            report = compress_blocks(model, batches, solver, only=names, resume_dir=work.folder / "blocks")
            touched = coverage(model, report.touched, left)
        facts = report.facts() | {"method": self.chosen_method} | facts_of_text(batches, self.continuations)
        return Done(None if self.streaming else model, facts, touched, saved)
