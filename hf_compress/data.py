"""Text and chats for training, evaluation and calibration: from the Hub, files, or a file inside an installed
package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_compress.encode import CausalCollator, Encoder
from hf_compress.errors import CompressError
from hf_compress.source import local_path

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


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
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "column with what comes before the text (a prompt; the text is its completion)"},
    )
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "instead of text: column with [{role, content}, ...], put through the tokenizer's chat template"
        },
    )
    completion_only: bool = field(
        default=False, metadata={"help": "learn the completions (or the assistant's turns) only, not the prompts"}
    )
    label_column: str = field(
        default="label", metadata={"help": "column with the label, integers or strings (classification)"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens a row is cut to"})
    packing: bool = field(
        default=False, metadata={"help": "join texts and cut into rows of max_length (causal models)"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read rows as training goes, for data larger than the disk; needs max_steps and whole eval_size"
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only so many rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate only so many rows"})
    seed: int = field(default=0, metadata={"help": "of the held-out part"})


Rows: TypeAlias = "Dataset | IterableDataset"


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows (input_ids, attention_mask, labels) and what pads them into batches. `train` is an
    IterableDataset when streaming; `labels` are a classifier's label names."""

    train: Rows
    eval: Dataset
    collator: Any
    labels: tuple[str, ...] = ()

    def first(self, count: int, *, seed: int) -> Dataset:
        """`count` rows of the training set in a seeded order (of a stream: out of its first 10 x `count`)."""
        if isinstance(self.train, Dataset):
            return self.train.shuffle(seed=seed).select(range(min(count, len(self.train))))
        return _kept(self.train.shuffle(seed=seed, buffer_size=10 * count).take(count))


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, *, task: str) -> Prepared:
    """Read, filter, split and tokenize.

    Raises:
        CompressError: missing file, split or column; nothing left after the filter; too few rows to hold some out;
        empty cells; packing without an end-of-text token; labels or a chat template missing; a chat template that
        rewrites earlier turns, when only completions are learned.
    """
    _check(data, tokenizer, task)
    train = _filtered(_read(data, data.split), data, task)
    classification = task == "text-classification"
    if classification and not isinstance(train.features[data.label_column], ClassLabel):
        train = train.class_encode_column(data.label_column)
    if data.eval_split is not None:
        held_out = _filtered(_read(data, data.eval_split), data, task)
        if classification:
            held_out = held_out.cast_column(data.label_column, train.features[data.label_column])
        held_out = _kept(held_out.take(data.max_eval_samples or int(data.eval_size))) if data.streaming else held_out
    elif isinstance(train, IterableDataset):
        held_out, train = _kept(train.take(int(data.eval_size))), train.skip(int(data.eval_size))
    else:
        stratify = data.label_column if classification else None
        try:
            parts = train.train_test_split(test_size=data.eval_size, seed=data.seed, stratify_by_column=stratify)
        except ValueError as error:
            raise CompressError(
                f"{len(train)} rows cannot be split: {error}",
                where=f"data.eval_size: {data.eval_size}",
                next_step="give more rows, a smaller eval_size, or an eval_split",
            ) from error
        train, held_out = parts["train"], parts["test"]
    if data.max_train_samples is not None:
        train = train.take(data.max_train_samples)
    held_out = held_out.take(data.max_eval_samples or len(held_out))
    if classification:
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collator = CausalCollator(tokenizer)
    encoder = Encoder(
        tokenizer,
        data.max_length,
        data.text_column,
        data.label_column if classification else None,
        data.prompt_column,
        data.messages_column,
        data.packing,
        data.completion_only,
    )
    labels = tuple(map(str, train.features[data.label_column].names)) if classification else ()
    return Prepared(_tokenized(train, encoder), _tokenized(held_out, encoder), collator, labels)


def peek(data: Data, *, task: str) -> None:
    """Raise what `prepare` would find wrong with files, splits, columns and filter, without model or tokenizer."""
    for split in (data.split, data.eval_split):
        if split is not None:
            _filtered(_read(data, split), data, task)


def _check(data: Data, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    wrong = ""
    if task == "text-classification":
        if data.streaming or data.packing or data.messages_column or data.prompt_column or data.completion_only:
            wrong = "streaming, packing, prompts and chats are for causal models"
    elif data.messages_column and data.prompt_column:
        wrong = "messages_column and prompt_column are two ways to say the same"
    elif data.completion_only and not (data.messages_column or data.prompt_column):
        wrong = "completion_only needs a prompt_column or a messages_column"
    elif data.messages_column and tokenizer.chat_template is None:
        wrong = "the tokenizer has no chat template for messages_column"
    elif data.packing and tokenizer.eos_token_id is None:
        wrong = "the tokenizer has no end-of-text token, which packing: true puts between texts"
    elif data.streaming and isinstance(data.eval_size, float) and not (data.eval_split and data.max_eval_samples):
        wrong = f"a stream has no share of {data.eval_size} to hold out: eval_size must be a number of rows"
    if wrong:
        raise CompressError(wrong, where=f"data: {data.id}", next_step="mend the data: section")


def _kept(rows: IterableDataset) -> Dataset:
    """The rows of a (short) stream, in memory."""
    return Dataset.from_list(list(rows))


def _read(data: Data, split: str) -> Any:
    path = local_path(data.id)
    reader = READERS.get(Path(path).suffix)
    try:
        loaded = (
            load_dataset(reader, data_files=path, streaming=data.streaming)
            if reader and Path(path).exists()
            else load_dataset(path, data.config, revision=data.revision, streaming=data.streaming)
        )
    except (FileNotFoundError, ConnectionError, ValueError, DatasetGenerationError, StopIteration) as error:
        if isinstance(error, DatasetGenerationError) and error.__cause__ is None:
            raise  # a full disk, say: its own words are all there is
        reason = (str(error.__cause__ or error).splitlines() or [""])[0]
        empty = "corresponds to no data" in reason or "No columns to parse" in reason
        empty |= isinstance(error, StopIteration)
        raise CompressError(
            "the data holds no row" if empty else f"cannot read the data: {reason}",
            where=f"data: {data.id}",
            next_step="look into the file" if empty else "check the path or Hub id (files: " + " ".join(READERS) + ")",
        ) from error
    assert isinstance(loaded, DatasetDict | IterableDatasetDict)
    if split not in loaded:
        raise CompressError(
            f"the data has no split {split!r}", where=f"data: {data.id}", next_step="splits: " + ", ".join(loaded)
        )
    return loaded[split]


def _filtered(rows: Any, data: Data, task: str) -> Any:
    texts = [data.messages_column] if data.messages_column else [data.prompt_column, data.text_column]
    needed = [*texts, data.label_column if task == "text-classification" else None, *data.filter]
    columns = rows.column_names or list(next(iter(rows)))  # a stream may not know its columns before its first row
    for column in needed:
        if column is not None and column not in columns:
            raise CompressError(
                f"the data has no column {column!r}",
                where=f"data: {data.id}",
                next_step="columns: " + ", ".join(columns),
            )
    options = {"load_from_cache_file": False} if isinstance(rows, Dataset) else {}
    for column, value in data.filter.items():
        allowed = set(value) if isinstance(value, list) else {value}
        rows = rows.filter(lambda x, allowed=allowed: x in allowed, input_columns=column, **options)
    if next(iter(rows), None) is None:
        raise CompressError(
            "no row is left after the filter", where=f"data.filter {data.filter}", next_step="check the values"
        )
    return rows


def _tokenized(rows: Any, encoder: Encoder) -> Any:
    if isinstance(rows, IterableDataset):
        return rows.map(encoder, batched=True, remove_columns=rows.column_names or list(next(iter(rows))))
    return rows.map(
        encoder, batched=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenizing"
    )
