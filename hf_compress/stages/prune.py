"""Set weights to zero in one shot, block by block, from calibration statistics. Makes no file smaller and no stock
runtime faster."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from hf_compress.calibration import tokens_in
from hf_compress.coverage import coverage
from hf_compress.criteria import criteria
from hf_compress.errors import CompressError
from hf_compress.oneshot import compress_blocks, compress_checkpoint, solvers
from hf_compress.patterns import check_target
from hf_compress.stages.base import Done, Stage, Work, refuse_after_export


@dataclass
class Prune(Stage):
    """``prune: {criterion: wanda, sparsity: 0.5, pattern: "2:4"}``"""

    sparsity: float = field(default=0.5, metadata={"help": "share of each weight matrix set to zero"})
    criterion: str = field(
        default="wanda", metadata={"help": "importance of a weight: see `hf-compress list criteria`"}
    )
    pattern: str = field(default="unstructured", metadata={"help": "unstructured, or N:M along the inputs (2:4)"})
    streaming: bool = field(
        default=False, metadata={"help": "read and write block by block; for models larger than memory"}
    )
    samples: int = field(default=128, metadata={"help": "rows of training text to calibrate on"})
    min_coverage: float = field(default=0.99, metadata={"help": "fail when less of the weights is touched"})

    def check(self, work_kinds: list[str], *, where: str) -> None:
        try:
            criteria.entry(self.criterion, where="criterion")
            check_target(self.sparsity, self.pattern)
        except CompressError as error:
            raise CompressError(
                error.what, where=f"{where}: {error.where}".rstrip(": "), next_step=error.next_step
            ) from error
        refuse_after_export(work_kinds, where=where)
        if "quantize" in work_kinds:
            raise CompressError("packed weights cannot be pruned", where=where, next_step="put prune before quantize")

    def run(self, work: Work) -> Done:
        solver = solvers["criterion"](criterion=self.criterion, sparsity=self.sparsity, pattern=self.pattern)
        vocabulary = (AutoConfig.from_pretrained(work.checkpoint) if self.streaming else work.model.config).vocab_size
        batches = work.calibration(vocabulary, self.samples) if solver.needs else []
        saved = work.folder / "pruned" if self.streaming else None
        if saved is not None:
            report, touched = compress_checkpoint(Path(work.checkpoint), saved, batches, solver)
        else:
            report = compress_blocks(work.model, batches, solver, resume_dir=work.folder / "blocks")
            touched = coverage(work.model, report.touched)
        touched.require(self.min_coverage, where="prune")
        facts = report.facts() | {"calibration_tokens": tokens_in(batches)}
        return Done(None if self.streaming else work.model, facts, touched, saved)
