"""Text data for training, evaluation and calibration: from the Hub, files, or a file inside an installed package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_compress.errors import CompressError
from hf_compress.source import local_path

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class Data:
    """``data: {id: my.csv, text_column: text, label_column: label, eval_size: 1000}``"""

    id: str = field(metadata={"help": "Hub id, a csv/json/jsonl/parquet/txt file, or package://PACKAGE/path"})
    config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on; else eval_size rows of `split` are held out"}
    )
    eval_size: int | float = field(
        default=0.1, metadata={"help": "rows (or a share) held out: seeded, stratified by label"}
    )
    filter: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "column: value (or list of values) to keep"}
    )
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    label_column: str = field(
        default="label", metadata={"help": "column with the label, integers or strings (classification)"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens a row is cut to"})
    packing: bool = field(
        default=False, metadata={"help": "join texts and cut into rows of max_length (causal models)"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only so many rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate only so many rows"})
    seed: int = field(default=0, metadata={"help": "of the held-out part"})


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows (input_ids, attention_mask, labels) and what pads them into batches."""

    train: Dataset
    eval: Dataset
    collator: Any


class CausalCollator:
    """Pads rows to the longest and sets labels to -100 at padding only, so a real end-of-text token is still
    learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = dict(self.pad([{"input_ids": r["input_ids"], "attention_mask": r["attention_mask"]} for r in rows]))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, *, task: str) -> Prepared:
    """Read, filter, split and tokenize.

    Raises:
        CompressError: missing file, split or column; nothing left after the filter; labels missing.
    """
    train = _read(data, data.split)
    needed = [data.text_column] + ([data.label_column] if task == "text-classification" else [])
    for column in [*needed, *data.filter]:
        if column not in train.column_names:
            raise CompressError(
                f"the data has no column {column!r}",
                where=f"data: {data.id}",
                next_step="columns: " + ", ".join(train.column_names),
            )
    train = _filtered(train, data)
    if task == "text-classification":
        train = (
            train.class_encode_column(data.label_column)
            if not isinstance(train.features[data.label_column], ClassLabel)
            else train
        )
    if data.eval_split is not None:
        held_out = _filtered(_read(data, data.eval_split), data)
        if task == "text-classification":
            held_out = held_out.cast_column(data.label_column, train.features[data.label_column])
    else:
        stratify = data.label_column if task == "text-classification" else None
        parts = train.train_test_split(test_size=data.eval_size, seed=data.seed, stratify_by_column=stratify)
        train, held_out = parts["train"], parts["test"]
    train = train.select(range(min(len(train), data.max_train_samples or len(train))))
    held_out = held_out.select(range(min(len(held_out), data.max_eval_samples or len(held_out))))
    if task == "text-classification":
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collator = CausalCollator(tokenizer)
    return Prepared(_tokenized(train, data, tokenizer, task), _tokenized(held_out, data, tokenizer, task), collator)


def _read(data: Data, split: str) -> Dataset:
    path = local_path(data.id)
    reader = _READERS.get(Path(path).suffix)
    try:
        loaded = (
            load_dataset(reader, data_files=path)
            if reader and Path(path).exists()
            else load_dataset(path, data.config, revision=data.revision)
        )
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise CompressError(
            f"cannot read the data: {str(error).splitlines()[0]}",
            where=f"data: {data.id}",
            next_step="check the path or Hub id (files: " + " ".join(_READERS) + ")",
        ) from error
    assert isinstance(loaded, DatasetDict)
    if split not in loaded:
        raise CompressError(
            f"the data has no split {split!r}", where=f"data: {data.id}", next_step="splits: " + ", ".join(loaded)
        )
    return loaded[split]


def _filtered(rows: Dataset, data: Data) -> Dataset:
    for column, value in data.filter.items():
        allowed = set(value) if isinstance(value, list) else {value}
        rows = rows.filter(lambda x, allowed=allowed: x in allowed, input_columns=column, load_from_cache_file=False)
    if len(rows) == 0:
        raise CompressError(
            "no row is left after the filter", where=f"data.filter {data.filter}", next_step="check the values"
        )
    return rows


def _tokenized(rows: Dataset, data: Data, tokenizer: PreTrainedTokenizerBase, task: str) -> Dataset:
    def one(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = dict(
            tokenizer(
                batch[data.text_column],
                truncation=not data.packing,
                max_length=None if data.packing else data.max_length,
            )
        )
        encoded.pop("token_type_ids", None)
        if task == "text-classification":
            encoded["labels"] = batch[data.label_column]
        elif data.packing:
            ids = [i for row in encoded["input_ids"] for i in [*row, tokenizer.eos_token_id]]
            chunks = [ids[i : i + data.max_length] for i in range(0, len(ids) - data.max_length + 1, data.max_length)]
            return {"input_ids": chunks, "attention_mask": [[1] * data.max_length for _ in chunks]}
        return encoded

    return rows.map(one, batched=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenizing")
