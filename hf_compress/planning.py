"""What a recipe would do, from the model's config alone: parameters, bytes and coverage of every stage."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.backends import backends, foresee
from hf_compress.backends.compressed_tensors import MIXED
from hf_compress.backends.elsewhere import FORMATS
from hf_compress.backends.onnx import refusal
from hf_compress.calibration import writes_nothing
from hf_compress.coverage import KEPT, coverage
from hf_compress.data import READERS, Data
from hf_compress.environments import environment
from hf_compress.errors import CompressError
from hf_compress.evaluation.cost import parameter_counts
from hf_compress.oneshot import mixed_layers
from hf_compress.recipe import Recipe
from hf_compress.selection import without
from hf_compress.source import format_of, load_meta, local_path, not_as_stored, read_config, require_floating, task_of
from hf_compress.stages import Cache, Export, Prune, Quantize, Shrink, Stage, Train
from hf_compress.stages.trained_grid import not_as_trained
from hf_compress.surgery import shrink
from hf_compress.techniques.qat import QAT
from hf_compress.weights import weights

REFUSED = "will be REFUSED: "
NEXT = "; next: "
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
MANY_CONTINUATIONS = 7
TOO_MANY = f"token by token; more than {MANY_CONTINUATIONS} continuations of a row were not seen to help"
FP8_BYTES = 1 + 4 / 128**2  # one byte a weight and one fp32 scale for each 128 x 128 block


@dataclass(frozen=True)
class Planned:
    """The model as one stage leaves it: bytes on disk; share and experts as `Coverage`; notes: what will happen."""

    name: str
    kind: str
    parameters: int
    active: int
    bytes: float
    share: float | None = None
    experts: float | None = None
    notes: list[str] = field(default_factory=list)


def plan(recipe: Recipe) -> list[Planned]:
    """One `Planned` for the source and for each stage, in order. Works on the meta device, no weight is read.

    Bytes of the source are those of its dtype, FP8 block-scaled included; a stage after it writes bfloat16.

    Raises:
        CompressError: as loading the recipe and its config; a model that is quantized already; a shrink that is
        impossible; QAT of what the model has not.
    """
    config = read_config(recipe.model)
    require_floating(recipe.model, config)
    model = load_meta(recipe.model)
    trained: QAT | None = None
    packed: Quantize | None = None
    rows = [_row("source", "source", model, _source_bytes(config, model), notes=_missing(recipe))]
    for named in recipe.stages:
        stage, notes = named.stage, list[str]()
        trained = stage.qat if isinstance(stage, Train) else trained
        if isinstance(stage, Train) and stage.qat is not None:
            stage.qat.check_model(model)
        if isinstance(stage, Train) and packed is not None:
            entry = backends.entry(packed.backend)
            scheme = {"bits": packed.bits, "group_size": packed.group_size} | packed.options
            if why := entry.traits["adapters"](model, **scheme):
                notes.append(f"{REFUSED}LoRA does not train on {entry.name}: {why}")
        share = experts = None
        bytes_now = _dense_bytes(model)
        if isinstance(stage, Shrink):
            shrink(model, layers=stage.layers, ffn=stage.ffn)
            bytes_now = _dense_bytes(model)
        elif isinstance(stage, Prune) or (isinstance(stage, Train) and stage.prune is not None):
            notes.append("zeros make no file smaller and no stock runtime faster")
            skip = stage.skip if isinstance(stage, Prune) else stage.prune.skip if stage.prune is not None else []
            names = [w.name for w in weights(model)]
            try:
                names = without(names, skip, where="skip")
            except CompressError as error:
                notes.append(f"{REFUSED}skip: {error.what}{NEXT}{error.next_step}")
            share = coverage(model, names).share
        elif isinstance(stage, Quantize):
            packed, entry = stage, backends.entry(stage.backend)
            before, dtype = model.dtype, stage.options.get("dtype")
            if dtype is not None:
                model.to(getattr(torch, dtype))
            foreseen = foresee(model, stage.backend, **stage.scheme(model), **stage.options)
            covered, refused = foreseen.coverage, foreseen.refused
            bits = min(foreseen.bits, float("inf") if stage.budget is None else stage.budget)
            bytes_now = _dense_bytes(model) - foreseen.dense_bytes + foreseen.bytes
            bytes_now -= (foreseen.bits - bits) * foreseen.count / 8
            share, experts = covered.share, covered.experts
            if trained is not None:
                notes += [REFUSED + what for what in not_as_trained(trained, model, foreseen.reasons, before)]
            if refused is not None:
                notes.append(f"{REFUSED}{refused.what} ({refused.where}){NEXT}{refused.next_step}")
            if foreseen.count:
                notes.append(_bits(stage, model, bits, foreseen.bits))
            if stage.overrides or stage.budget is not None:
                notes.append(MIXED)
            if "environment" in entry.traits:
                notes += _needs(entry.traits["environment"], f"backend {entry.name}")
            notes += [f"memory: {entry.traits['memory']}", f"speed: {entry.traits['speed']}"]
            notes += [f"stays as it is: {_count(names)} {why}" for why, names in covered.skipped.items()]
            low = min(share, 1.0 if experts is None else experts)
            if refused is None and low < stage.min_coverage:
                left = "; ".join(
                    f"{_count(names)} {why}" for why, names in covered.skipped.items() if why not in KEPT.values()
                )
                notes.append(f"{REFUSED}covers {low:.1%}, below min_coverage {stage.min_coverage:.0%}: {left}")
        elif isinstance(stage, Cache):
            why = stage.refusal(model)
            notes.append(REFUSED + why if why else stage.foreseen)
        elif isinstance(stage, Export):
            chosen = FORMATS.get(stage.format)
            folder, kind = chosen.folder if chosen else "onnx", stage.quantize or "fp32"
            notes.append(f"a copy for {RUNTIMES[folder]} ({kind}) lies in {folder}/ beside the checkpoint")
            if chosen:
                notes += _needs(chosen.environment, f"export to {stage.format}")
            why = (chosen.refusal if chosen else refusal)(model.config)
            notes += [REFUSED + why] if why else []
        if any(isinstance(other.stage, Cache) for other in recipe.stages) and (name := _environment(stage)):
            notes.append(
                f"{REFUSED}the environment {name} has no hqq, which the cache stage needs{NEXT}leave one of them out"
            )
        if isinstance(stage, Prune | Quantize):
            notes += _streams(recipe, stage) + _masks(model, stage)
        if not any(note.startswith(REFUSED) for note in notes):  # a skip that finds nothing would be stumbled over
            notes += _continuations(model, stage) + ([] if recipe.data is None else _text(recipe.data, stage, model))
        if recipe.data is None and stage.needs_text(model):
            notes.append(f"{REFUSED}it reads text, and the recipe has no data: section")
        notes.sort(key=lambda note: not note.startswith(REFUSED))
        rows.append(_row(named.name, named.kind, model, bytes_now, share, experts, notes))
    return rows


def _missing(recipe: Recipe) -> list[str]:
    """Files of data that are named and not here."""
    named = [recipe.data, *(getattr(each.stage, "extra_data", None) for each in recipe.stages)]
    found = []
    for data in (data for data in named if data is not None):
        try:
            place = local_path(data.id)
        except CompressError as error:
            found.append(f"{REFUSED}data: {error.what}{NEXT}{error.next_step}")
            continue
        if Path(place).suffix in READERS and not Path(place).exists():
            found.append(f"{REFUSED}data: there is no file {place}{NEXT}check the path")
    return found


def _count(names: Collection[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) > 1 else ''}:"


def _bits(stage: Quantize, model: PreTrainedModel, bits: float, codes_and_scales: float) -> str:
    """Bits a weight, and what of them goes into scales where all weights have the same."""
    said = f"bits a weight: {'' if stage.budget is None else 'at most '}{bits:.2f}, "
    if stage.overrides:
        return said + "scales included"
    scales = codes_and_scales - stage.bits
    said += f"{scales:.2f} of them scales"
    wide = "packing" in backends.entry(stage.backend).traits and model.dtype == torch.float32 and scales > 0.1
    return said + (" in float32 (model.dtype: bfloat16 halves those)" if wide else "")


def _streams(recipe: Recipe, stage: Prune | Quantize) -> list[str]:
    """What is in the way of a stage that would go block by block."""
    if not stage.streaming:
        return []
    found = []
    if task_of(recipe.model, read_config(recipe.model)) != "causal-lm":
        found.append(f"{REFUSED}streaming takes causal language models{NEXT}leave streaming out")
    if recipe.stages[0].stage is stage and (why := not_as_stored(recipe.model)):
        found.append(f"nothing is streamed, the whole model is read first: {why}")
    return found


def _text(data: Data, stage: Stage, model: PreTrainedModel) -> list[str]:
    """How much of the text a stage reads, rows being as long as they may be."""
    if isinstance(stage, Train):
        notes = [f"trains {stage.length}, each of up to {data.max_length} tokens"]
        if stage.qat is not None and stage.qat.start == "gptq":
            read = stage.qat.samples * data.max_length * (1 + stage.qat.continuations)
            notes.append(f"qat: gptq rounds first, on up to {read:,} tokens")
        if stage.qat is not None and stage.qat.continuations > MANY_CONTINUATIONS:
            notes.append(f"qat: {TOO_MANY}")
        return notes
    if not isinstance(stage, Prune | Quantize) or not stage.calibrates(model):
        return []
    own = stage.samples * data.max_length
    tokens, widest = own * (1 + stage.continuations), max((w.shape[1] for w in weights(model)), default=0)
    said = f"calibrates on up to {tokens:,} tokens"
    if tokens > own:
        said += f", {tokens - own:,} of them written by the model"
    if stage.continuations > MANY_CONTINUATIONS:
        said += f" ({TOO_MANY})"
    if tokens < 2 * widest:
        said += (
            f", less than 2 for each of the {widest:,} inputs of the widest matrix: raise samples, or continuations"
        )
    return [said]


def _continuations(model: PreTrainedModel, stage: Stage) -> list[str]:
    if not isinstance(stage, Prune | Quantize) or not stage.continuations:
        return []
    why = writes_nothing(model)
    if not why and not stage.calibrates(model):
        why = f"continuations are text, and {stage.method or 'rounding without a method'} reads none"
    return [f"{REFUSED}{why}{NEXT}leave continuations out, or take a method that calibrates"] if why else []


def _masks(model: PreTrainedModel, stage: Prune | Quantize) -> list[str]:
    elsewhere = isinstance(stage, Quantize) and "environment" in backends.entry(stage.backend).traits
    mixed = mixed_layers(model.config)
    if not mixed or elsewhere or not stage.calibrates(model):
        return []
    return [f"{REFUSED}{mixed}{NEXT}a method that reads no text, or a model without sliding-window layers"]


def _environment(stage: Stage) -> str:
    """Which one it works in, "" where it needs none."""
    if isinstance(stage, Export):
        return FORMATS[stage.format].environment if stage.format in FORMATS else ""
    return str(backends.entry(stage.backend).traits.get("environment", "")) if isinstance(stage, Quantize) else ""


def _needs(name: str, what: str) -> list[str]:
    """What a stage in another environment needs, as a refusal while that is not built."""
    wanted = environment(name)
    try:
        wanted.require(what=what)
    except CompressError as error:
        return [f"needs: {wanted.command}", f"{REFUSED}{error.what}{NEXT}{error.next_step}"]
    return [f"needs the environment {name}: built ({wanted.folder.name})"]


def require_possible(recipe: Recipe) -> None:
    """Raise the first refusal that `plan` foresees, before any weight is read."""
    for row in plan(recipe):
        for note in row.notes:
            if note.startswith(REFUSED):
                what, _, step = note.removeprefix(REFUSED).partition(NEXT)
                more = "`hf-compress plan` shows what else of the recipe will be refused"
                raise CompressError(what, where=row.name, next_step=f"{step}. {more}" if step else more)


def _row(
    name: str,
    kind: str,
    model: PreTrainedModel,
    size: float,
    share: float | None = None,
    experts: float | None = None,
    notes: list[str] | None = None,
) -> Planned:
    counts = parameter_counts(model)
    return Planned(name, kind, counts["parameters"], counts["active_parameters"], size, share, experts, notes or [])


def _source_bytes(config: PreTrainedConfig, model: PreTrainedModel) -> float:
    total = _dense_bytes(model)
    if format_of(config) == "fp8":
        block = [w for w in weights(model) if w.kind not in KEPT]
        total += sum(w.shape[0] * w.shape[1] * FP8_BYTES - w.nbytes for w in block)
    return total


def _dense_bytes(model: PreTrainedModel) -> float:
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))
