"""Prune a model in memory in one shot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.criteria import Statistics, criteria
from hf_compress.errors import CompressError
from hf_compress.oneshot.engine import OneshotReport, Solver, run_blocks
from hf_compress.patterns import mask_of
from hf_compress.weights import Weight, blocks_of


def pruner(*, criterion: str, sparsity: float, pattern: str) -> Solver:
    """Solver that zeroes the lowest-scored weights and leaves the rest as they are."""
    entry = criteria.entry(criterion)

    def solve(weight: Weight, statistics: Statistics) -> Tensor:
        scores = entry.value(weight.matrix, statistics)
        try:
            mask = mask_of(scores, sparsity=sparsity, pattern=pattern, group=entry.traits["group"])
        except CompressError as error:
            raise CompressError(error.what, where=weight.name, next_step=error.next_step) from error
        return weight.matrix * mask

    return solve


def prune_blocks(
    model: PreTrainedModel,
    batches: list[Batch],
    *,
    criterion: str = "wanda",
    sparsity: float,
    pattern: str = "unstructured",
    resume_dir: Path | None = None,
) -> OneshotReport:
    """Prune every attention, FFN and expert matrix in place; resumable at the block when `resume_dir` is given.

    wanda compares weights within each output row, magnitude within each matrix; N:M within each group of M inputs.

    Raises:
        CompressError: unknown criterion; M does not divide a matrix (before anything is changed); blocks in
        `resume_dir` of another run.
    """
    solver = pruner(criterion=criterion, sparsity=sparsity, pattern=pattern)
    store = _InMemory(model, resume_dir, fingerprint([criterion, sparsity, pattern, model.config.to_dict()], batches))
    return run_blocks(model, batches, solver, needs=criteria.entry(criterion).traits["needs"], store=store)


def fingerprint(options: object, batches: list[Batch]) -> str:
    """Of options and calibration tokens: finished blocks of another run must not be taken for this one's."""
    digest = hashlib.sha256(json.dumps(options, default=str, sort_keys=True).encode())
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()


class _InMemory:
    """The model is all here; finished blocks are also written to a folder, for a run that is interrupted."""

    def __init__(self, model: PreTrainedModel, folder: Path | None, stamp: str) -> None:
        self.model, self.folder, self.stamp = model, folder, stamp
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def _path(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{block:05}.safetensors"

    def load(self, block: int) -> bool:
        if self.folder is None or not self._path(block).exists():
            return False
        with safe_open(self._path(block), "pt") as opened:
            if opened.metadata().get("fingerprint") != self.stamp:
                raise CompressError(
                    "finished blocks of another run lie here",
                    where=str(self.folder),
                    next_step="remove the folder, or repeat that run's options",
                )
        blocks_of(self.model)[block].load_state_dict(load_file(self._path(block)))
        return True

    def save(self, block: int) -> None:
        if self.folder is not None and not self._path(block).exists():
            temporary = self._path(block).with_suffix(".part")
            save_file(
                {k: v.contiguous() for k, v in blocks_of(self.model)[block].state_dict().items()},
                temporary,
                {"fingerprint": self.stamp},
            )
            temporary.rename(self._path(block))
