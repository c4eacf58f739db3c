"""Batches that the student writes itself: what it does wrong is what the teacher corrects (GKD)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hf_compress.weights import base_of

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


@torch.no_grad()
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
    end = model.generation_config.eos_token_id
    ends = torch.tensor(end if isinstance(end, list) else [-1 if end is None else end], device=prompts[0].device)
    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=max(0, int(ends[0])),
    )
    training, device, its_own = model.training, prompts[0].device, model.generation_config
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.eval()
        model.generation_config = options  # generate() would take penalties, cuts and beams from the model's own
        try:
            written = [row for group in _together(model, prompts, room) for row in _written(model, *group, options)]
        finally:
            model.train(training)
            model.generation_config = its_own
    rows, labels = [], []
    for prompt, most, row in zip(prompts, room, written, strict=True):
        over = torch.isin(row, ends).nonzero()
        new = row[: min(most, int(over[0]) + 1 if len(over) else most)]
        rows.append(torch.cat([prompt, new]))
        labels.append(torch.cat([torch.full_like(prompt, -100), new]))
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def _together(model: Any, prompts: list[Tensor], room: list[int]) -> list[tuple[list[Tensor], list[int]]]:
    """Prompts and room of what is written in one go: all rows, or each alone where the longest prompt and the longest
    continuation, which are of different rows, would together pass the model's last position."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or max(map(len, prompts)) + max(room) <= limit:
        return [(prompts, room)]
    return [([prompt], [most]) for prompt, most in zip(prompts, room, strict=True)]


def _written(model: Any, prompts: list[Tensor], room: list[int], options: GenerationConfig) -> list[Tensor]:
    """What follows each prompt, and perhaps more than it has room for."""
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    options.max_new_tokens = max(room)
    return list(model.generate(input_ids=ids, attention_mask=mask, generation_config=options)[:, ids.shape[1] :])
