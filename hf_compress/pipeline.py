"""compress(recipe) -> a finished folder: the whole program on one screen."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.backends import backends
from hf_compress.blocks import block_profile
from hf_compress.card import FACTS, read_facts, save_facts, versions, write_card
from hf_compress.data import peek
from hf_compress.errors import CompressError
from hf_compress.evaluation import evaluate
from hf_compress.evaluation.cost import machine_facts
from hf_compress.files import write_whole
from hf_compress.finished import Finished, alone, digest, require_one_process, work_folder
from hf_compress.hub import Publish, Published, publish
from hf_compress.licence import copy_texts, source_licence
from hf_compress.planning import require_possible
from hf_compress.recipe import NamedStage, Recipe, parse
from hf_compress.source import (
    ModelSource,
    format_of,
    load_meta,
    load_model,
    not_as_stored,
    read_config,
    task_of,
    weight_files,
)
from hf_compress.stages import Done, Work
from hf_compress.verification import (
    EXPECTATION,
    model_files,
    verify,
    verify_names,
    write_expectation,
    write_hashes,
    write_onnx_expectation,
)

_UNPUBLISHED = (
    "unpublished"  # in the work folder: the output is finished, by the recipe of this digest, and not on the Hub
)


@dataclass(frozen=True)
class Result:
    """folder: what plain from_pretrained opens, with README.md (the card) and hf_compress.json (`facts`).
    published: where the recipe's `publish:` section put it."""

    folder: Path
    facts: dict[str, Any]
    published: Published | None = None

    def push_to_hub(self, repo: str, **options: Any) -> Published:
        """``compress(recipe, "out").push_to_hub("user/small", private=True)``: as `hf_compress.hub.publish`."""
        return publish(self.folder, repo, **options)


def compress(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Run every stage, then measure, verify, describe and, where the recipe says so, publish the result.

    Work happens in a hidden sibling of `output`; the finished folder gets its name at the end by a rename. Run again
    after an interruption: finished stages are not redone, training goes on from its last checkpoint, and a finished
    folder that did not reach the Hub is only published.

    Raises:
        CompressError: the output exists, or, with `overwrite`, was made by no run; another run is at work on it, or
        this is one of several ranks; it is to be published and nobody is logged in; whatever a stage, the evaluation,
        `verify` or `publish` finds wrong.
    """
    require_one_process()
    output = Path(output).absolute()
    if recipe.publish is not None:
        recipe.publish.require_possible()
    unpublished = work_folder(output) / _UNPUBLISHED

    def only_publish() -> bool:
        return recipe.publish is not None and output.exists() and _made_by(recipe, unpublished)

    if only_publish():
        with alone(unpublished.parent):
            if only_publish():
                say("finished before")
                assert recipe.publish is not None
                return _published(recipe.publish, output, unpublished, say, check=True)
    _require_free(output, overwrite)
    config = read_config(recipe.model)
    task, licence = task_of(recipe.model, config), source_licence(recipe.model, recipe.license)
    require_possible(recipe)
    for data in (recipe.data, *(getattr(named.stage, "extra_data", None) for named in recipe.stages)):
        if data is not None:
            peek(data, task=task)
    with alone(unpublished.parent):
        _require_free(output, overwrite)  # another run may have finished meanwhile
        return _compress(recipe, output, unpublished, task, licence, config, command=command, say=say)


def _require_free(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise CompressError(
            "the output folder exists", where=str(output), next_step="choose another --output, or pass --overwrite"
        )
    if output.is_file() or (output.exists() and not (output / FACTS).is_file() and any(output.iterdir())):
        raise CompressError(
            f"nothing here was made by a run (there is no {FACTS}), and --overwrite would delete it",
            where=str(output),
            next_step="choose another --output, or remove what is there yourself",
        )


def _compress(
    recipe: Recipe,
    output: Path,
    unpublished: Path,
    task: str,
    licence: dict[str, Any] | None,
    config: Any,
    *,
    command: str | None,
    say: Callable[[str], None],
) -> Result:
    """`compress`, once nothing of the recipe is refused and the work folder is held."""
    room = unpublished.parent
    torch.manual_seed(recipe.seed)
    transformers.set_seed(recipe.seed)

    ran = _run_stages(recipe, task, room, say)
    final = room / "final"
    opens = _assemble(ran, recipe, task, licence, final)
    facts: dict[str, Any] = {
        "name": recipe.name,
        "command": command,
        "recipe": _without_publish(recipe),
        "seed": recipe.seed,
        "license": licence,
        "task": task,
        "base_model": recipe.model.id,
        "base_revision": getattr(config, "_commit_hash", None) or recipe.model.revision,
        "new_weights": ran.new_weights,
        "source_format": format_of(config),
        "source_bytes": sum(file.stat().st_size for file in weight_files(recipe.model)) or None,
        "datasets": [recipe.data.id] if recipe.data else [],
        "stages": ran.records,
        "files": model_files(final),
        "blocks": _blocks(final, ran.floating, task, ran.records),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine_facts(),
        "versions": versions(),
        "container": _container(recipe),
        "evaluation": None,
    }
    if recipe.evaluate is not None and opens:
        say("measuring")
        facts["evaluation"] = evaluate(
            final, ran.places["dense"], spec=recipe.evaluate, data=recipe.data, task=task, seed=recipe.seed
        )
    if opens:
        say("verifying in a fresh process")
        facts["verify"] = verify(final)[str(final)]
    else:
        say("larger than this machine's memory: neither measured nor opened; comparing names and shapes")
        verify_names(final)
        facts["verify"] = None
    save_facts(facts, final / FACTS)
    write_card(final)
    if output.exists():
        shutil.rmtree(output)
    final.rename(output)
    if recipe.publish is None:
        shutil.rmtree(room)
        return Result(output, facts)
    write_whole(unpublished, digest(_without_publish(recipe)))
    for folder in (path for path in room.iterdir() if path.is_dir()):
        shutil.rmtree(folder)
    return _published(recipe.publish, output, unpublished, say, check=False)  # it was verified a moment ago


@dataclass
class _Ran:
    """What the stages so far came to.

    checkpoint: of the last one; floating: of the last one before the weights were packed. places: as `Work.stages`.
    new_weights: as `load_model` found them.
    records: a stage's name, kind, seconds, facts and coverage. extras: folders to lie beside the final checkpoint.
    quantized, scales: as in `Work`.
    """

    checkpoint: Path
    floating: Path
    places: dict[str, str]
    new_weights: list[str]
    records: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Path] = field(default_factory=dict)
    quantized: str = ""
    scales: dict[str, Tensor] = field(default_factory=dict)

    def add(self, named: NamedStage, finished: Finished, *, baseline: str) -> None:
        record = finished.record
        self.records.append(record)
        self.checkpoint, self.scales = finished.checkpoint, finished.scales
        self.quantized = record["quantized"] or self.quantized
        if not self.quantized:
            self.floating = self.checkpoint
        self.extras |= {name: finished.folder / name for name in record["extras"]}
        self.places |= dict.fromkeys(
            [named.name, *(["dense"] if named.name == baseline else [])], str(self.checkpoint)
        )


def _run_stages(recipe: Recipe, task: str, room: Path, say: Callable[[str], None]) -> _Ran:
    """Every stage that did not finish before, each on what the one before it left; its result is on disk before the
    next begins, and in memory where it can stay."""
    start, new = _read_source(recipe, room, say)
    ran = _Ran(start, start, {"source": str(start), "dense": str(start)}, new)
    model: PreTrainedModel | None = None
    for index, named in enumerate(recipe.stages):
        finished = Finished.stage(room, recipe, index)
        if finished.done:
            say(f"{named.name}: done before")
            model = None
        else:
            say(f"{named.name} ({named.kind})")
            work = _work(recipe, task, ran, finished.running)
            work.say, work.scales = say, ran.scales
            if model is not None:
                # where a run that was interrupted would load it: a result must not hang on that
                here = ran.quantized or recipe.model.device_map is not None
                work.__dict__["model"] = model if here else model.to("cpu")
            with finished.timed():
                done = named.stage.run(work)
            if done.facts.get("warning"):
                say(f"  {done.facts['warning']}")
            record = {
                "name": named.name,
                "kind": named.kind,
                "seconds": round(finished.seconds, 1),
                "facts": done.facts,
                "coverage": done.coverage.as_facts() if done.coverage else None,
                "quantized": done.quantized,
                "extras": sorted(done.extras),
            }
            finished.save(done, work.tokenizer, record)
            model = done.model
        ran.add(named, finished, baseline=recipe.baseline)
    return ran


def _read_source(recipe: Recipe, room: Path, say: Callable[[str], None]) -> tuple[Path, list[str]]:
    """The checkpoint that the first stage starts from: where the model lies, for a stage that streams it from there,
    else a copy as plain safetensors; and the weights that were drawn at random, as the source does not hold them (a
    new head)."""
    files, source = weight_files(recipe.model), Finished.stage(room, recipe, -1)
    streams = bool(recipe.stages) and getattr(recipe.stages[0].stage, "streaming", False)
    if streams and files and not not_as_stored(recipe.model):
        return files[0].parent, []
    if not source.done:
        say("reading the model")
        model, tokenizer, new = load_model(recipe.model, seed=recipe.seed)
        source.save(Done(model), tokenizer, {"kind": "source", "new_weights": new})
    if new := source.record["new_weights"]:
        say(f"  not in the source, and so drawn at random: {', '.join(new)}")
    return source.checkpoint, new


def _assemble(ran: _Ran, recipe: Recipe, task: str, licence: dict[str, Any] | None, final: Path) -> bool:
    """Copy all that ships into `final`, with what `verify` will look for; whether the model fits in memory here."""
    shutil.rmtree(final, ignore_errors=True)
    shutil.copytree(ran.checkpoint, final)
    for name, folder in ran.extras.items():
        shutil.copytree(folder, final / name)
    opens = _fits(final, recipe.model)
    if opens and not (final / EXPECTATION).exists():  # a stage that only wrote to disk had no model in memory to ask
        write_expectation(load_model(_source(recipe, task, final), seed=recipe.seed)[0], final)
    if "onnx" in ran.extras:
        write_onnx_expectation(final)
    copy_texts(recipe.model, licence, final)
    write_hashes(final)
    return opens


def _published(
    section: Publish, output: Path, unpublished: Path, say: Callable[[str], None], *, check: bool
) -> Result:
    """Publish the finished folder; `unpublished` goes once it is on the Hub."""
    try:
        done = publish(output, **dataclasses.asdict(section), check=check, say=say)
    except CompressError as error:
        again = f"{output} is finished: the same command only publishes it"
        then = "; ".join(filter(None, (error.next_step, again)))
        raise CompressError(error.what, where=error.where, next_step=then) from error
    shutil.rmtree(unpublished.parent)
    return Result(output, read_facts(output), done)


def measure_again(folder: Path, dense: str) -> dict[str, Any]:
    """Measure a finished folder on this machine as its recipe says, against `dense` (a folder or Hub id), and renew
    its facts and card.

    Raises:
        CompressError: no such folder; the recipe measures nothing.
    """
    facts = read_facts(folder)
    recipe = parse(facts["recipe"])
    if recipe.evaluate is None:
        raise CompressError("the recipe measures nothing", where=str(folder), next_step="add an evaluate: section")
    found = evaluate(folder, dense, spec=recipe.evaluate, data=recipe.data, task=facts["task"], seed=recipe.seed)
    facts |= {"evaluation": found, "machine": found["machine"]}
    save_facts(facts, folder / FACTS)
    write_card(folder)
    return facts


def _without_publish(recipe: Recipe) -> dict[str, Any]:
    """What made the model; where its maker put it is no business of those who run the recipe again."""
    return {key: value for key, value in recipe.raw.items() if key != "publish"}


def _made_by(recipe: Recipe, unpublished: Path) -> bool:
    return unpublished.is_file() and unpublished.read_text() == digest(_without_publish(recipe))


def _blocks(final: Path, floating: Path, task: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits a weight of each block as it ships; zeros as the last stage with floating weights left them."""
    pruned = any(r["kind"] == "prune" or "Pruning" in r["facts"].get("techniques", {}) for r in records)
    found = block_profile(final, task, zeros=False)
    if pruned:
        for entry, before in zip(found, block_profile(floating, task, zeros=True), strict=True):
            entry["zeros"] = before["zeros"]
    return found


def _fits(folder: Path, source: ModelSource) -> bool:
    """Whether the model, unpacked, fits in the memory that is free now."""
    model = load_meta(ModelSource(id=str(folder), task=source.task))
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    return source.device_map is not None or need < 0.9 * psutil.virtual_memory().available


def _source(recipe: Recipe, task: str, checkpoint: Path) -> ModelSource:
    return ModelSource(id=str(checkpoint), task=task, device_map=recipe.model.device_map)


def _work(recipe: Recipe, task: str, ran: _Ran, folder: Path) -> Work:
    source, tokenizer = _source(recipe, task, ran.checkpoint), None
    if (ran.checkpoint / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(ran.checkpoint)
    return Work(source, task, tokenizer, recipe.data, folder, ran.places, recipe.seed, ran.quantized)


def _container(recipe: Recipe) -> dict[str, str] | None:
    for named in recipe.stages:
        if named.kind == "quantize":
            entry = backends.entry(named.stage.backend)  # type: ignore[attr-defined]
            return {"name": entry.name} | {k: v for k, v in entry.traits.items() if isinstance(v, str)}
    return None
