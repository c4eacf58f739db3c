"""The work folder of a run: one run's at a time, and where the result of each stage lies, so that an interrupted run
goes on after the last one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_compress.card import save_facts
from hf_compress.errors import CompressError
from hf_compress.files import stamps, write_whole
from hf_compress.recipe import NamedStage, Recipe
from hf_compress.source import local_path
from hf_compress.stages import Done
from hf_compress.verification import write_expectation


def work_folder(output: Path) -> Path:
    """Where a run works until `output` is finished: beside it, hidden."""
    return output.with_name(f".{output.name}.work")


def require_one_process() -> None:
    """Raise a CompressError in each of several ranks: they would work in one folder."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise CompressError(
            f"a recipe runs in one process, and this is one of {ranks}",
            where="WORLD_SIZE",
            next_step="run it without torchrun; to train on several GPUs, use CompressionTrainer in a script",
        )


@contextmanager
def alone(room: Path) -> Iterator[None]:
    """The work folder, held: two runs in it would take each other's files away.

    Raises:
        CompressError: another run holds it.
    """
    room.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(room / "lock").acquire(timeout=0)
    except Timeout as error:
        raise CompressError(
            "another run is at work on this output",
            where=str(room),
            next_step="wait for it, or choose another --output",
        ) from error
    with held:
        try:
            yield
        finally:
            if [path.name for path in room.glob("*")] == ["lock"]:  # a run that was refused leaves nothing
                shutil.rmtree(room)


def digest(known: Any) -> str:
    """sha256 of what JSON says of it."""
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _places(known: Any) -> list[str]:
    """Every model and data set that a piece of a recipe names."""
    if isinstance(known, list):
        return [place for each in known for place in _places(each)]
    if not isinstance(known, dict):
        return []
    keys = ("id", "tokenizer", "teacher_model", "teacher_cache")
    own = [known[key] for key in keys if isinstance(known.get(key), str)]
    several = [name for name in known.get("teachers") or [] if isinstance(name, str)]
    return own + several + [place for value in known.values() for place in _places(value)]


@dataclass(frozen=True)
class Finished:
    """Where one stage's result lies: ``<number>-<name>-<fingerprint>/`` (of the recipe up to here, and of the local
    files it names: a row that was mended makes another result), with ``checkpoint``
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
        places = set(_places(known)) - {"dense", "source", *(s.name for s in recipe.stages)}
        short = digest([known, [stamps(local_path(place)) for place in sorted(places)]])[:12]
        return Finished(room / f"{index + 1}-{named[-1].name if named else 'source'}-{short}")

    @property
    def running(self) -> Path:
        """Scratch of the stage while it runs; survives an interruption."""
        path = self.folder.with_name(self.folder.name + ".running")
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what the work inside takes to `seconds`, also where it is interrupted."""
        started = time.time()
        try:
            yield
        finally:
            write_whole(self.running / "seconds", str(self.seconds + time.time() - started))

    @property
    def seconds(self) -> float:
        """That the stage has run for so far, interrupted runs included."""
        file = self.running / "seconds"
        return float(file.read_text()) if file.exists() else 0.0

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
