"""Write a teacher's answers down once, so that training needs no teacher in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Sequence, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_compress.data import Prepared
from hf_compress.errors import CompressError
from hf_compress.files import sha256, write_whole
from hf_compress.heads import head_of as kind_of
from hf_compress.heads import targets
from hf_compress.source import ModelSource, load_model, weight_files
from hf_compress.techniques.chunked import ask, head_of
from hf_compress.techniques.offline import MANIFEST, is_whole, row_key, teacher_hash, tokenizer_hash

ROWS = 256  # of the data, in a shard
BATCH = 8


def cache_teacher(
    source: ModelSource,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    kind: str = "samples",
    samples: int = 12,
    temperature: float = 2.0,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    vocabulary: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the answers of the teacher at `source` to every row of the training set, in shards of 256 rows.

    kind: ``samples``, draws from softmax(logits / temperature), unbiased; or ``topk``, the likeliest classes and
    their log-probabilities. samples: how many of either at each position; about 12 suffice. part: (i, n) makes every
    n-th shard from the i-th, for n processes at once. Shards that are whole are not made again, so an interrupted
    command goes on; one is the same whoever makes it. vocabulary: the student's; of padded vocabularies only what
    both have is kept.

    Raises:
        CompressError: the folder holds another cache; not a causal language model; streamed rows; the teacher's
        logits are not finite.
    """
    if kind not in ("samples", "topk") or samples < 1 or not temperature > 0 or not 0 <= part[0] < part[1]:
        raise CompressError(
            f"kind {kind!r}, {samples} samples, temperature {temperature}, part {part[0]}/{part[1]}",
            where="cache-teacher",
            next_step="kind is samples or topk, samples at least 1, temperature above 0, a part counts from 0: 0/4 to "
            "3/4",
        )
    rows = prepared.train
    if not isinstance(rows, Dataset):
        raise CompressError(
            "streamed rows have no number to share them out by",
            where="data.streaming",
            next_step="set streaming: false; rows are mapped from disk, not read into memory",
        )
    model = load_model(source).model
    if kind_of(model) != "causal":
        raise CompressError(
            "only causal language models have a cache",
            where="cache-teacher",
            next_step="train with the teacher in memory: distill.teacher_model",
        )
    files = weight_files(source)
    its_own = int(model.config.get_text_config().vocab_size)
    vocabulary = its_own if vocabulary is None else min(vocabulary, its_own)
    shards = -(-len(rows) // ROWS)
    facts = {
        "teacher": source.id,
        "teacher_hash": teacher_hash(files[0].parent) if files else "",
        "tokenizer": tokenizer_hash(tokenizer),
        "data": _data_hash(rows),
        "vocabulary": vocabulary,
        "kind": kind,
        "samples": min(samples, vocabulary) if kind == "topk" else samples,
        "temperature": temperature,
        "seed": seed,
        "shards": shards,
    }
    folder = Path(folder)
    _claim(folder, facts)
    head = head_of(model)
    for shard in range(part[0], shards, part[1]):
        file = folder / f"{shard:05d}.parquet"
        if is_whole(file):
            continue
        made = torch.Generator(model.device).manual_seed(seed * 1_000_003 + shard)
        found: list[dict[str, Any]] = []
        for start in range(shard * ROWS, min((shard + 1) * ROWS, len(rows)), BATCH):
            chosen = [rows[i] for i in range(start, min(start + BATCH, (shard + 1) * ROWS, len(rows)))]
            found += _answers(model, head, chosen, prepared.collator, facts, made)
        _write(found, file, facts)
        say(f"shard {shard + 1} of {shards}: {len(found)} rows")
    return folder


def _answers(
    model: Any, head: Any, rows: list[dict[str, Any]], collator: Any, facts: dict[str, Any], made: torch.Generator
) -> Iterator[dict[str, Any]]:
    batch = {k: v.to(model.device) for k, v in collator(rows).items()}
    labels = batch.pop("labels")
    trained = targets("causal", labels) != -100
    teacher = ask(model, head, batch)
    places = trained.flatten().nonzero().squeeze(-1)
    parts = [_summary(teacher, part, facts, made) for part in places.split(64)]
    ids, rest = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    ends = trained.sum(1).cumsum(0).tolist()
    for row, begin, end in zip(rows, [0, *ends], ends):
        yield {
            "key": row_key(list(row["input_ids"]), list(row["labels"])),
            "ids": ids[begin:end].flatten().numpy(),
            "rest": rest[begin:end].flatten().numpy(),
        }


def _summary(teacher: Any, rows: Tensor, facts: dict[str, Any], made: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, n) ids; entropy (rows,) of samples, or log-probabilities (rows, n) of the top k."""
    teacher.chunk(rows)
    logits = teacher.shape(teacher.outputs(rows).float())[:, : facts["vocabulary"]]
    if not torch.isfinite(logits).all():
        raise CompressError(
            "the teacher's logits are not finite", where=str(facts["teacher"]), next_step="check the teacher's dtype"
        )
    log_p = (logits / facts["temperature"]).log_softmax(-1)
    if facts["kind"] == "topk":
        logs, ids = log_p.topk(facts["samples"], dim=-1)
        return ids, logs
    p = log_p.exp()
    drawn = torch.multinomial(p, facts["samples"], replacement=True, generator=made)
    return drawn.sort(-1).values, -(p * log_p).sum(-1)


def _write(rows: list[dict[str, Any]], file: Path, facts: dict[str, Any]) -> None:
    """Through a temporary sibling; the note with its hash last."""
    small = "uint16" if facts["vocabulary"] <= 2**16 else "uint32"
    features = Features({"key": Value("int64"), "ids": Sequence(Value(small)), "rest": Sequence(Value("float16"))})
    temporary = file.with_suffix(".part")
    Dataset.from_list(rows, features=features).to_parquet(temporary)
    digest = sha256(temporary)
    temporary.rename(file)
    write_whole(file.with_suffix(".json"), json.dumps({"rows": len(rows), "sha256": digest}))


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if not manifest.exists():
        if any(folder.iterdir()):
            raise CompressError("the folder holds something else", where=str(folder), next_step="choose another one")
        write_whole(manifest, json.dumps(facts, indent=2))
    known = json.loads(manifest.read_text())
    differing = sorted(key for key, value in facts.items() if key != "teacher" and known.get(key) != value)
    if differing:
        raise CompressError(
            f"the folder holds a cache with another {', '.join(differing)}",
            where=str(folder),
            next_step="choose another folder, or remove this one",
        )


def _data_hash(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for row in rows:
        assert isinstance(row, dict)
        digest.update(row_key(list(row["input_ids"]), list(row["labels"])).to_bytes(8, "big"))
    return digest.hexdigest()


def bytes_of(folder: str | Path) -> int:
    """Of all shards, on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.parquet"))
