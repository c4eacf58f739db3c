"""Rounding that begins from what the one-shot solver makes of the weights, instead of from their nearest points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from hf_compress.calibration import Batch, calibration_batches
from hf_compress.data import Prepared
from hf_compress.grids import Grid
from hf_compress.oneshot import compress_blocks, solvers
from hf_compress.weights import Weight, base_of

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


def training_batches(trainer: CompressionTrainer, samples: int) -> list[Batch]:
    """`samples` rows of the trainer's training set, in an order of its seed: the same on every rank, as batches of
    input_ids and attention_mask, (batch, tokens) int64 each.

    Raises:
        CompressError: as `calibration_batches`.
    """
    rows: Any = trainer.train_dataset
    if not isinstance(rows, (Dataset, IterableDataset)):
        rows = _as_dataset(rows, samples, trainer.args.seed)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="calibration")

    def with_mask(some: list[Any]) -> dict[str, Tensor]:
        batch = dict(collate(some))
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return batch

    config: Any = base_of(trainer.model).config
    return calibration_batches(
        Prepared(rows, rows, with_mask),
        samples=samples,
        vocab_size=config.get_text_config().vocab_size,
        seed=trainer.args.seed,
    )


def _as_dataset(rows: Any, samples: int, seed: int) -> Dataset:
    """Of any other kind of dataset: rows drawn by the seed, of one that is only iterated the first."""
    if isinstance(rows, torch.utils.data.IterableDataset):
        return Dataset.from_list(list(islice(rows, samples)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_list([rows[int(index)] for index in order[:samples]])


def solved(
    model: nn.Module,
    wanted: Sequence[Weight],
    grid: Grid,
    batches: list[Batch],
    *,
    epochs: int,
    resume_dir: Path | None = None,
) -> dict[str, Tensor]:
    """Put the values that ``gptq`` (with `epochs` of its tuning) rounds `wanted` to into the model, and leave it in
    evaluation mode; weight name -> their scales (out, groups). resume_dir: as `compress_blocks`.

    Every rank does it on the same rows, and takes what rank 0 found: products of two devices differ in their last
    digits, and levels beside a rounding border with them.

    Raises:
        CompressError: as `compress_blocks`.
    """
    names = [weight.name for weight in wanted]
    solver = solvers["gptq"](grid=grid, epochs=epochs)
    report = compress_blocks(base_of(model), batches, solver, only=names, resume_dir=resume_dir)
    if torch.distributed.is_initialized():
        for value in [*{w.parameter: w.whole.data for w in wanted}.values(), *report.scales.values()]:
            torch.distributed.broadcast(value, src=0)
    return report.scales
