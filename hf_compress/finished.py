"""Where the result of each stage of a run lies, so that an interrupted run goes on after the last one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_compress.card import save_facts
from hf_compress.recipe import NamedStage, Recipe
from hf_compress.stages import Done
from hf_compress.verification import write_expectation


def digest(known: Any) -> str:
    """sha256 of what JSON says of it."""
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Finished:
    """Where one stage's result lies: ``<number>-<name>-<fingerprint of the recipe up to here>/``, with ``checkpoint``
    (the answers of the model in memory that was saved beside it, in ``verify``), ``record.json``, and
    ``scales.safetensors`` where QAT trained a grid."""

    folder: Path

    @staticmethod
    def stage(room: Path, recipe: Recipe, index: int) -> Finished:
        named: list[NamedStage] = recipe.stages[: index + 1]
        known = [
            recipe.raw["model"],
            recipe.seed,
            recipe.raw.get("data") if index >= 0 else None,
            recipe.raw["stages"][: index + 1],
            recipe.baseline if recipe.baseline in {s.name for s in named} else "source",
        ]
        short = digest(known)[:12]
        return Finished(room / f"{index + 1}-{named[-1].name if named else 'source'}-{short}")

    @property
    def running(self) -> Path:
        """Scratch of the stage while it runs; survives an interruption."""
        path = self.folder.with_name(self.folder.name + ".running")
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def done(self) -> bool:
        return self.folder.exists()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "record.json").read_text())
        return record

    @property
    def scales(self) -> dict[str, Tensor]:
        file = self.folder / "scales.safetensors"
        return load_file(file) if file.exists() else {}

    def save(self, done: Done, tokenizer: Any, record: dict[str, Any]) -> None:
        running = self.running
        made = running / "result"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        if done.saved is not None:
            done.saved.rename(made / "checkpoint")
        elif done.model is not None:
            done.model.save_pretrained(made / "checkpoint")
            write_expectation(done.model, made / "checkpoint")
            if tokenizer is not None:
                tokenizer.save_pretrained(made / "checkpoint")
        for name, folder in done.extras.items():
            folder.rename(made / name)
        if done.scales:
            save_file(
                {name: scale.cpu().contiguous() for name, scale in done.scales.items()}, made / "scales.safetensors"
            )
        save_facts(record, made / "record.json")
        made.rename(self.folder)
        shutil.rmtree(running)
