"""One-shot compression of a model that fits in memory, in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.errors import CompressError
from hf_compress.oneshot.engine import Notes, OneshotReport, run_blocks
from hf_compress.oneshot.solvers import Solver
from hf_compress.source import require_unquantized
from hf_compress.weights import blocks_of, require_one_device, weights


def compress_blocks(
    model: PreTrainedModel,
    batches: list[Batch],
    solver: Solver,
    *,
    only: Collection[str] | None = None,
    resume_dir: Path | None = None,
) -> OneshotReport:
    """Apply `solver` to every attention, FFN and expert matrix (or to `only` these, by name) in place; resumable at
    the block when `resume_dir` is given.

    Raises:
        CompressError: a quantized model, or one on several devices; what the solver and `run_blocks` find wrong;
            blocks of another run.
    """
    require_unquantized(model, where="one-shot compression")
    require_one_device(model, where="one-shot compression")
    values = [w.matrix[0, :64].float().cpu() for w in weights(model)] if resume_dir is not None else []
    facts = [model.config.to_dict(), solver.options, sorted(only) if only is not None else None]
    stamp = fingerprint(facts, values, batches)
    return run_blocks(model, batches, solver, InMemory(model, resume_dir, stamp), only=only)


def fingerprint(facts: list[Any], tensors: list[Tensor], batches: list[Batch]) -> str:
    """Of model, solver and calibration text: finished blocks of another run must not be taken for this one's."""
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    for tensor in [*tensors, *(batch[name] for batch in batches for name in sorted(batch))]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


SCALE = "scale of "  # before a weight's name, beside the block's own tensors


class InMemory:
    """The model is all here; finished blocks are also written to a folder, for a run that is interrupted."""

    def __init__(self, model: PreTrainedModel, folder: Path | None, stamp: str) -> None:
        self.model, self.folder, self.stamp, self.scales = model, folder, stamp, dict[str, Tensor]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def _path(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{block:05}.safetensors"

    def blocks_only(self) -> None:
        """The rest of the model is here too, and stays."""

    def finished(self, block: int) -> bool:
        return self.folder is not None and self._path(block).exists()

    def load(self, block: int) -> None:
        """The dense values are here."""

    def restore(self, block: int) -> Notes:
        with safe_open(self._path(block), "pt") as opened:
            metadata = opened.metadata()
            if metadata.get("fingerprint") != self.stamp:
                raise CompressError(
                    "finished blocks of another run lie here",
                    where=str(self.folder),
                    next_step="remove the folder, or repeat that run's options",
                )
        module = blocks_of(self.model)[block]
        tensors = load_file(self._path(block), device=str(next(module.parameters()).device))
        self.scales |= {key.removeprefix(SCALE): tensors.pop(key) for key in list(tensors) if key.startswith(SCALE)}
        module.load_state_dict(tensors)
        return Notes(**json.loads(metadata["notes"]))

    def save(self, block: int, notes: Notes) -> None:
        if self.folder is not None and not self.finished(block):
            temporary = self._path(block).with_suffix(".part")
            names = {w.name for w in weights(self.model) if w.block == block} & self.scales.keys()
            tensors = blocks_of(self.model)[block].state_dict() | {SCALE + n: self.scales[n] for n in names}
            metadata = {"fingerprint": self.stamp, "notes": json.dumps(asdict(notes))}
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
            temporary.rename(self._path(block))
