"""Teachers whose answers were written down: samples of their distributions instead of a model in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.files import sha256
from hf_compress.heads import targets
from hf_compress.techniques.base import Step
from hf_compress.techniques.soft_targets import SoftTargets, as_wide_as

MANIFEST = "cache.json"


@dataclass
class _Kept:
    """Answers as tables, ids (rows, n) and what goes with them, looked up row by row; about the first `classes`
    classes, where the student's vocabulary is padded to more."""

    ids: Tensor
    rest: Tensor
    classes: int | None = None
    weight: float = 1.0

    def chunk(self, rows: Tensor) -> None:
        self._rows = rows

    def block(self, block: slice) -> None:
        rows = self._rows[block]
        self._ids, self._rest = self.ids[rows], self.rest[rows]

    def compare(self, log_q: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a cache holds no evaluation rows")


class Sampled(_Kept):
    """`n` draws from softmax(teacher / T) at each row (random-sampling KD, https://arxiv.org/abs/2503.16870).

    ids: (rows, n) drawn classes, with repeats. rest: (rows,) entropy of the whole distribution, nats. The value is an
    unbiased estimate of T^2 KL and its gradient T (q - counts / n) of T (q - p), at any student: also where q = p,
    where a renormalized top-k would still pull.
    """

    def learn(self, student: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
        log_q = (student[:, : self.classes] / soft.temperature).log_softmax(-1)
        value = -log_q.gather(-1, self._ids).mean(-1) - self._rest
        share = torch.full_like(self._ids, -1 / self._ids.shape[-1], dtype=log_q.dtype)
        gradient = log_q.exp_().scatter_add_(-1, self._ids, share)
        return value * soft.temperature**2, as_wide_as(student, gradient.mul_(soft.temperature))


class TopK(_Kept):
    """The k likeliest classes and one bucket for all others: KL between those k + 1 probabilities.

    ids: (rows, k). rest: (rows, k) log-probabilities at temperature T. The gradient is zero where q = p; elsewhere it
    knows nothing of how the tail is shared out.
    """

    def learn(self, student: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
        log_q = (student[:, : self.classes] / soft.temperature).log_softmax(-1)
        kept, p = log_q.gather(-1, self._ids), self._rest.exp()
        p_tail = (1 - p.sum(-1)).clamp_min(1e-9)
        q = log_q.exp_()
        q_tail = q.scatter(-1, self._ids, 0.0).sum(-1).clamp_min(1e-9)  # 1 - sum would lose what a sure student leaves
        value = (p * (self._rest - kept)).sum(-1) + p_tail * (p_tail / q_tail).log()
        # d value / d logits = q + slope, slope = -p at the k and -p_tail q / q_tail elsewhere
        gradient = q * (1 - p_tail / q_tail).unsqueeze(-1)
        gradient.scatter_(-1, self._ids, kept.exp() - p)
        return value * soft.temperature**2, as_wide_as(student, gradient.mul_(soft.temperature))


def row_key(ids: list[int], labels: list[int]) -> int:
    """Of one unpadded row: the same tokens with the same labels have the same answers."""
    digest = hashlib.sha256(json.dumps([ids, labels]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def tokenizer_hash(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def teacher_hash(folder: str | Path) -> str:
    """Of a folder's config and every byte of its weights."""
    digest = hashlib.sha256()
    for file in sorted([*Path(folder).glob("config.json"), *Path(folder).glob("*.safetensors")]):
        digest.update(file.name.encode() + bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def is_whole(shard: Path) -> bool:
    """Whether a shard is all there, by the hash in the note beside it, which is written last."""
    try:
        known = json.loads(shard.with_suffix(".json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return shard.exists() and bool(sha256(shard) == known)


class Cache:
    """What `cache_teacher` wrote, checked before any work.

    Raises:
        CompressError: no such cache, shards missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            raise self._error(f"no teacher cache here ({MANIFEST} is missing)", "hf-compress cache-teacher writes one")
        try:
            self.facts: dict[str, Any] = json.loads(manifest.read_text())
            files = [self.folder / f"{index:05d}.parquet" for index in range(self.facts["shards"])]
        except (ValueError, KeyError) as error:
            raise self._error(f"{MANIFEST} is damaged", "remove this folder and make the cache anew") from error
        for file in files:
            if not file.exists():
                raise self._error(
                    f"the cache is not finished: {file.name} is missing",
                    "run the cache-teacher command again to go on",
                )
            if not is_whole(file):
                raise self._error(
                    f"{file.name} is not what was written: cut off or changed",
                    "run the cache-teacher command again: only that shard is made anew",
                )
        rows = load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        assert isinstance(rows, Dataset)
        self.rows = rows.with_format("numpy")
        self._where = {int(key): index for index, key in enumerate(rows["key"])}

    def _error(self, what: str, next_step: str) -> CompressError:
        return CompressError(what, where=str(self.folder), next_step=next_step)

    def check(self, *, temperature: float, tokenizer: Any, teacher: str | None, vocabulary: int) -> None:
        """Raise a CompressError for a cache of another temperature, tokenizer, teacher or vocabulary."""
        facts = self.facts
        if facts["temperature"] != temperature:
            raise self._error(
                f"the cache holds answers at temperature {facts['temperature']}, the training asks for {temperature}",
                f"temperature: {facts['temperature']}, or make another cache",
            )
        if tokenizer is not None and tokenizer_hash(tokenizer) != facts["tokenizer"]:
            raise self._error("the cache was made with another tokenizer", "make the cache anew")
        if teacher is not None and Path(teacher).is_dir() and teacher_hash(teacher) != facts["teacher_hash"]:
            raise self._error(f"the cache is stale: {teacher} is not the teacher it was made with", "make it anew")
        if facts["vocabulary"] > vocabulary:
            raise self._error(
                f"the teacher's vocabulary is {facts['vocabulary']}, the student's {vocabulary}",
                "use a teacher of the same tokenizer",
            )

    def answers(self, step: Step) -> Sampled | TopK:
        """The teacher of one batch: rows of it flattened to (batch * positions).

        Raises:
            CompressError: a row that is not in the cache.
        """
        ids, labels = step.inputs["input_ids"], step.inputs["labels"]
        real = step.inputs.get("attention_mask", torch.ones_like(ids)).bool().cpu()
        trained = (targets(step.head, labels) != -100).cpu()
        width = self.facts["samples"]
        found = torch.zeros(*ids.shape, width, dtype=torch.long)
        other = torch.zeros(*ids.shape, width) if self.facts["kind"] == "topk" else torch.zeros(ids.shape)
        for index, (row, given) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            keep = real[index].tolist()
            key = row_key([t for t, k in zip(row, keep) if k], [t for t, k in zip(given, keep) if k])
            if key not in self._where:
                raise self._error(
                    "a row of the training data is not in the cache",
                    "make the cache from the same data, tokenizer, max_length and packing as the training",
                )
            entry: Any = self.rows[self._where[key]]
            found[index][trained[index]] = torch.from_numpy(entry["ids"].astype("int64")).view(-1, width)
            rest = torch.from_numpy(entry["rest"].astype("float32"))
            other[index][trained[index]] = rest.view(-1, width) if self.facts["kind"] == "topk" else rest
        flat = found.flatten(0, 1).to(ids.device), other.flatten(0, 1).to(ids.device)
        return (TopK if self.facts["kind"] == "topk" else Sampled)(*flat, self.facts["vocabulary"])
