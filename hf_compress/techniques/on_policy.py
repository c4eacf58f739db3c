"""Batches that the student writes itself: what it does wrong is what the teacher corrects (GKD)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_compress.weights import base_of
from hf_compress.writing import write

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


def mixed(trainer: CompressionTrainer, batches: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The micro-batches of one optimizer step, each with probability `share` as the student goes on with it
    (https://arxiv.org/abs/2306.13649). Which ones and what is drawn depend on seed, step and rank alone, so that a
    resumed run draws the same; which ones is the same on all ranks."""
    found, step, seed = [], trainer.state.global_step, trainer.args.seed
    for index, batch in enumerate(batches):
        if random.Random(f"{seed} {step} {index}").random() < share:
            drawn = random.Random(f"{seed} {step} {index} {trainer.args.process_index}").getrandbits(31)
            with trainer.accelerator.autocast():
                batch = continued(base_of(trainer.model), batch, seed=drawn)
        found.append(batch)
    return found


def continued(model: Any, batch: dict[str, Any], *, seed: int) -> dict[str, Tensor]:
    """A batch of the same prompts with the student's continuations, drawn from its whole distribution, as labels.

    The prompt of a row is what stands before its first label; of plain text the first half. A continuation ends at
    the end-of-text token, or where the row is as long as it was. Rows are padded on the right.
    """
    prompts, room = [], []
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for ids, real, labels in zip(batch["input_ids"], mask, batch["labels"], strict=True):
        row, first = ids[real], (labels[real] != -100).int().argmax()
        prompts.append(row[: first if first else max(1, len(row) // 2)])
        room.append(max(1, len(row) - len(prompts[-1])))
    rows, labels = [], []
    for prompt, new in zip(prompts, write(model, prompts, room, seed=seed), strict=True):
        rows.append(torch.cat([prompt, new]))
        labels.append(torch.cat([torch.full_like(prompt, -100), new]))
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
