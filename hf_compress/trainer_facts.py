"""What a CompressionTrainer can say of its run: the facts that its card is written from."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from hf_compress.blocks import block_profile
from hf_compress.card import versions
from hf_compress.licence import copy_texts, source_licence
from hf_compress.source import ModelSource, task_of
from hf_compress.verification import model_files

if TYPE_CHECKING:
    from hf_compress.trainer_push import PublishingTrainer

_PRIVATE = ("token", "dir", "hub_", "push_to_hub", "logging_dir", "run_name")  # where and for whom, not how


def trainer_facts(
    trainer: PublishingTrainer,
    folder: Path,
    *,
    name: str,
    license: str | None = None,
    datasets: Sequence[str] = (),
    in_progress: bool = False,
) -> dict[str, Any]:
    """Facts of the model saved in `folder`, in the form that `compress` records; nothing in them was measured against
    a dense model. license: as the recipe's key; copies the source's licence texts into `folder`."""
    student, state = trainer._student, trainer.state
    base = student.config._name_or_path or None
    there = base is not None and (Path(base).exists() or base.count("/") == 1)
    source = ModelSource(id=base) if there else ModelSource(config={})
    licence = source_licence(source, license)
    copy_texts(source, licence, folder)
    task = task_of(ModelSource(id=str(folder)), student.config)
    techniques = {type(t).__name__: t.facts() for t in trainer.techniques} if not in_progress else {}
    ran: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
    record = {
        "name": "train",
        "kind": "train",
        "seconds": round(ran.get("train_runtime", 0.0), 1),
        "facts": {
            "steps": state.global_step,
            "epochs": state.epoch,
            "log": [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry],
            "techniques": techniques,
        },
        "coverage": None,
        "quantized": "",
        "extras": [],
    }
    return {
        "name": name,
        "command": "",
        "recipe": None,
        "trainer": type(trainer).__name__,
        "training_arguments": _arguments(trainer.args),
        "seed": trainer.args.seed,
        "license": licence,
        "task": task,
        "base_model": base,
        "base_revision": getattr(student.config, "_commit_hash", None),
        "source_bytes": None,
        "datasets": list(datasets),
        "stages": [record],
        "files": model_files(folder),
        "blocks": block_profile(folder, task, zeros="Pruning" in techniques),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "container": None,
        "evaluation": None,
        "verify": None,
        "in_progress": state.global_step if in_progress else None,
    }


def _arguments(args: TrainingArguments) -> dict[str, Any]:
    """What differs from the defaults and JSON can hold, without names, folders and tokens."""
    given = args.to_dict()
    plain = {f.name: f.default for f in dataclasses.fields(args)}
    return {
        key: value
        for key, value in given.items()
        if value != plain.get(key) and not any(part in key for part in _PRIVATE) and _is_json(value)
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
