"""A small, seeded sample of training text, and what the model goes on with, as batches for one-shot statistics."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_compress.data import Prepared
from hf_compress.errors import CompressError
from hf_compress.precision import quick_copy
from hf_compress.writing import bytes_held, write

Batch = dict[str, Tensor]
PROMPT = 16  # tokens of a row, half of it at most, that the model goes on with
KEPT = 2 << 30  # bytes of keys and values, at most, of the rows that are written in one go


def calibration_batches(
    prepared: Prepared, *, samples: int, vocab_size: int, batch_size: int = 8, seed: int = 0
) -> list[Batch]:
    """`samples` rows of the training set as padded batches of input_ids and attention_mask, (batch, tokens) int64
    each.

    Raises:
        CompressError: no rows, or token ids outside the model's vocabulary (a tokenizer of another model).
    """
    rows = prepared.first(samples, seed=seed)
    if len(rows) == 0:
        raise CompressError(
            "no row to calibrate on",
            where="data",
            next_step="give at least one row longer than max_length when packing",
        )
    batches = []
    for start in range(0, len(rows), batch_size):
        batch = prepared.collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batches.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    highest = max(int(b["input_ids"].max()) for b in batches)
    if highest >= vocab_size:
        raise CompressError(
            f"the data holds token {highest}, the model's vocabulary has {vocab_size}",
            where="data",
            next_step="use the model's own tokenizer",
        )
    return batches


def with_continuations(
    model: PreTrainedModel, batches: list[Batch], times: int, *, seed: int = 0, saved: Path | None = None
) -> list[Batch]:
    """`batches`, and after them `times` as many rows that `model` writes: the first tokens of each row, and what it
    goes on with from there, drawn from its whole distribution, until the row is as long as it was
    (https://arxiv.org/abs/2305.17888). Second-order solvers then see new inputs where text is scarce. An fp32 model on
    a CPU with instructions for bfloat16 writes in that, as a copy (half its size more in memory meanwhile).

    saved: where what was written is kept, so that a run that is interrupted goes on with the same text.

    Raises:
        CompressError: a model that writes no text.
    """
    if not times:
        return batches
    if why := writes_nothing(model):
        raise CompressError(why, where="continuations", next_step="leave continuations out")
    rows = [row for row in rows_of(batches) if len(row) > 1]
    if not rows:
        return batches
    facts = {"of": hashlib.sha256(torch.cat(rows).cpu().numpy().tobytes()).hexdigest(), "times": str(times)}
    facts["seed"] = str(seed)
    if saved is not None and saved.exists():
        with safe_open(saved, "pt") as file:
            if file.metadata() == facts:
                return batches + _batches([file.get_tensor(str(i)) for i in range(times * len(rows))], like=batches)
    prompts = [row[: min(PROMPT, len(row) // 2)].to(model.device) for row in rows] * times
    room = [len(row) - len(prompt) for row, prompt in zip(rows * times, prompts, strict=True)]
    writer, made = quick_copy(model), list[Tensor]()
    groups = _goes(writer, prompts, max(map(len, rows)))
    with tqdm(total=sum(max(room[g]) for g in groups), desc="the model writes text", unit=" positions") as bar:
        for number, g in enumerate(groups):
            new = write(writer, prompts[g], room[g], seed=seed * 1_000_003 + number, ends=False, bar=bar)
            made += [torch.cat(pair).cpu() for pair in zip(prompts[g], new, strict=True)]
    if saved is not None:
        part = saved.with_name(saved.name + ".part")
        save_file({str(i): row for i, row in enumerate(made)}, part, metadata=facts)
        part.rename(saved)
    return batches + _batches(made, like=batches)


def writes_nothing(model: PreTrainedModel) -> str:
    """Why `model` cannot go on with a text; "" where it can."""
    causal = model.can_generate() and not model.config.is_encoder_decoder
    return "" if causal else f"only causal language models go on with a text, and this is a {type(model).__name__}"


def rows_of(batches: list[Batch]) -> list[Tensor]:
    """(tokens,) int64 each, without padding."""
    return [ids[real] for b in batches for ids, real in zip(b["input_ids"], b["attention_mask"].bool(), strict=True)]


def _goes(writer: PreTrainedModel, prompts: list[Tensor], longest: int) -> list[slice]:
    """Which of `prompts` are written in one go, until rows are `longest`: as few goes as their keys and values leave,
    of like size (a go of two rows takes nearly as long as one of twenty)."""
    training = writer.training
    with torch.no_grad():
        cache = writer.eval()(input_ids=prompts[0][None], use_cache=True).past_key_values
    writer.train(training)
    row = bytes_held(cache) / len(prompts[0]) * longest
    count = math.ceil(len(prompts) / max(1, KEPT // max(1, row)))
    ends = [len(prompts) * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def _batches(rows: list[Tensor], like: list[Batch]) -> list[Batch]:
    """Padded on the right, as many rows together as in the largest of `like`."""
    size = max(len(batch["input_ids"]) for batch in like)
    return [
        {
            "input_ids": pad_sequence(rows[i : i + size], batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows[i : i + size]], batch_first=True),
        }
        for i in range(0, len(rows), size)
    ]


def cut(batches: list[Batch], tokens: int) -> list[Batch]:
    """The same rows, in the same order, in batches of at most `tokens` tokens, padding included, or of one row."""
    found = []
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        parts = zip(*(tensor.split(rows) for tensor in batch.values()), strict=True)
        found += [dict(zip(batch, part, strict=True)) for part in parts]
    return found


def tokens_in(batches: list[Batch]) -> int:
    """Tokens that are not padding."""
    return sum(int(b["attention_mask"].sum()) for b in batches)
