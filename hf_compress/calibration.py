"""A small, seeded sample of training text, as batches for one-shot statistics."""

from __future__ import annotations

from torch import Tensor

from hf_compress.data import Prepared
from hf_compress.errors import CompressError

Batch = dict[str, Tensor]


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
