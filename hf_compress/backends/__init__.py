"""Containers: each function writes a checkpoint that plain from_pretrained opens, and says what it could not store."""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration import Batch
from hf_compress.coverage import KEPT, Coverage, coverage
from hf_compress.environments import Say, environment
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.oneshot import compress_blocks, solvers
from hf_compress.oneshot.solvers import check_solver_options
from hf_compress.registry import Registry
from hf_compress.source import require_unquantized
from hf_compress.verification import write_expectation, write_hashes
from hf_compress.weights import Weight, require_finite, require_one_device, weights

WORTH_A_WARNING = 0.99  # where a recipe would stop


class PartlyStored(UserWarning):
    """Weights stayed as they were; a recipe's stage looks at its min_coverage instead."""


@dataclass(frozen=True)
class Written:
    """model: what the folder reloads as; None when only another environment opens it, which then answered for it.
    coverage: what is stored in fewer bits, counted in the written model. facts: what the library measured. warning:
    what a reader of the folder must not do."""

    model: PreTrainedModel | None
    coverage: Coverage
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    warning: str = ""


Backend = Callable[..., Written]
"""``backend(model, tokenizer, folder, *, bits, group_size, **options) -> Written``.

Traits, shown by `plan` and the card: disk, memory, speed, experts, serves, needs (sentences). Functions:
``check(*, bits, group_size, **options)`` raises for what the container does not have, before any model is read;
``stores(weight, *, bits, group_size, **options)``: bytes on disk as a float, or the reason (str) why this weight stays
as it is;
``grid(*, bits, group_size, **options)``: the `Grid` that it stores, for solvers and QAT to round to;
``packing(model, *, bits, group_size, **options)``, where weights can be packed one by one, at scales that a solver or
QAT chose: an `oneshot.Container`.
``adapters(model, *, bits, group_size, **options)``: why LoRA does not train on what it packs of `model`, "" where it
does.
Where weights can differ, all but `grid` take `grids` too: weight name -> its own `Grid`. A backend with `grid` takes
``scales`` (weight name -> (out, groups)), on which the weights of the model lie, and stores their codes.
environment: name of the one its library lives in (`hf_compress.environments`); such a backend takes ``calibration``
(batches) and writes the expectation of `verify` itself.
"""

backends: Registry[Backend] = Registry("backend", __name__)


def check_group(group_size: int | None, *, where: str = "group_size") -> None:
    """Raise a CompressError for a group of less than one weight."""
    if group_size is not None and group_size < 1:
        raise CompressError(f"group size {group_size} is not positive", where=where)


def dividing(found: Iterable[Weight]) -> str:
    """The usual group sizes that divide the inputs of all of them."""
    sizes = [size for size in (256, 128, 64, 32, 16) if all(w.shape[1] % size == 0 for w in found)]
    return ", ".join(map(str, sizes)) or "none; leave group_size out"


GIVEN = ("model", "tokenizer", "folder", "bits", "group_size", "grids", "scales", "calibration", "say")
"""Arguments of backends that `quantize` and its stage have names of their own for."""
OF_A_RECIPE = ("overrides", "budget", "smooth", "eora", "streaming", "samples", "min_coverage")
"""Keys of the stage that `quantize` does not take: they need the recipe's data, or its files."""


def options_of(backend: str) -> dict[str, Any]:
    """What a recipe's `options` may say of the backend: name -> default."""
    given = inspect.signature(backends[backend]).parameters.values()
    return {option.name: option.default for option in given if option.name not in GIVEN}


def check_options(backend: str, options: Mapping[str, Any], *, where: str) -> None:
    """Raise a CompressError for an option that the backend lacks (did you mean), or of another type."""
    known = options_of(backend)
    hints = get_type_hints(backends[backend])
    for option, value in options.items():
        if option not in known:
            raise CompressError(
                f"{backend} has no option {option!r}", where=where, next_step=did_you_mean(option, known)
            )
        try:
            TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise CompressError(
                f"{error.errors()[0]['msg']} (got {value!r})",
                where=f"{where}.{option}",
                next_step=f"leave it out for {known[option]!r}, or see `hf-compress list {backend}`",
            ) from error


@dataclass(frozen=True)
class Foreseen:
    """What a container makes of a model's block matrices, known before any weight is read.

    bytes: on disk. dense_bytes: of the same matrices now. reasons: weight -> why it stays as it is. refused: why it
    would not be written, None where it would. count: weights that it packs. bits: of each of them, scales included.
    """

    bytes: float
    dense_bytes: float
    coverage: Coverage
    reasons: dict[str, str]
    count: int
    bits: float
    refused: CompressError | None = None


def foresee(
    model: PreTrainedModel, backend: str, *, bits: int, group_size: int | None = None, **options: Any
) -> Foreseen:
    """From names and shapes alone, so `model` may be on the meta device."""
    traits, scheme = backends.entry(backend).traits, {"bits": bits, "group_size": group_size} | options
    found = {w: traits["stores"](w, **scheme) for w in weights(model)}
    reasons = {w.name: size for w, size in found.items() if isinstance(size, str)}
    covered = coverage(model, [w.name for w in found if w.name not in reasons], reasons)
    refused = None
    try:
        traits["check"](**scheme)
        if "packing" in traits:
            traits["packing"](model, **scheme)
    except CompressError as error:
        refused = error
    if refused is None and covered.share == 0:
        refused = CompressError(
            "no matrix would be stored in fewer bits: "
            + "; ".join(why for why in covered.skipped if why not in KEPT.values()),
            where="quantize",
            next_step="another backend (see the containers in the README)"
            + (f", or one of these group sizes: {dividing(found)}" if group_size else ""),
        )
    sizes = [w.nbytes if isinstance(size, str) else size for w, size in found.items()]
    packed = [(size, w.shape[0] * w.shape[1]) for w, size in found.items() if not isinstance(size, str)]
    count = sum(number for _, number in packed)
    average = 8 * sum(size for size, _ in packed) / max(1, count)
    return Foreseen(float(sum(sizes)), float(sum(w.nbytes for w in found)), covered, reasons, count, average, refused)


def quantize(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    backend: str = "bitsandbytes",
    bits: int = 8,
    group_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: str | None = None,
    batches: Sequence[Batch] = (),
    solver_options: Mapping[str, Any] | None = None,
    scales: Mapping[str, Tensor] | None = None,
    say: Say = lambda _: None,
    **options: Any,
) -> Written:
    """``quantize(model, "out", backend="bitsandbytes", bits=4, method="gptq", batches=batches, tokenizer=tokenizer)``:
    write a folder that plain from_pretrained opens and `verify` can check.

    Args:
        method: a solver that first rounds `model`, in place, to the points that the container stores (``hf-compress
            list solvers``; gptq). None: the container's own rounding.
        batches: of input_ids and attention_mask, (batch, tokens) each, for a method or a backend that calibrates.
        scales: weight name -> (out, groups), where the weights lie on a grid already (`OneshotReport.scales`).
        say: told what a backend in another environment does.
        options: the backend's own: see ``hf-compress list BACKEND``.

    What the container cannot store stays as it was: see `Written.coverage`; more than 1% is warned of. `overrides`,
    `budget`, `smooth` and `eora` are keys of a recipe's quantize stage.

    Raises:
        CompressError: unknown backend, method or option, or of another type; the folder exists; bits or group sizes
        the container does not have, or that leave every weight as it was; a model that is quantized already, or whose
        weights are not finite; scales of no weight, of other groups, or for a container that finds its own.
    """
    _check_types(model, bits, group_size, batches)
    folder = Path(folder)
    if folder.exists():
        raise CompressError("the output folder exists", where=str(folder), next_step="choose another")
    entry, part = backends.entry(backend), folder.with_name(folder.name + ".part")
    if asked := next((key for key in OF_A_RECIPE if key in options), None):
        raise CompressError(
            f"quantize() does not take {asked!r}",
            where=asked,
            next_step=f"put it into a recipe, `quantize: {{{asked}: ...}}`, for `hf-compress run` or compress()",
        )
    check_options(backend, {name: given for name, given in options.items() if name != "grids"}, where="options")
    entry.traits["check"](bits=bits, group_size=group_size, **options)
    _require_sound(model)
    _check_scales(scales or {}, model, backend, bits, group_size, options)
    foreseen = foresee(model, backend, bits=bits, group_size=group_size, **options)
    if foreseen.refused is not None:
        raise foreseen.refused
    if scales and method is not None:
        raise CompressError(
            f"the weights lie on a grid already, and {method} would round them anew",
            where="method",
            next_step="leave out method, to store what was trained, or scales",
        )
    if method is not None:
        scheme = {"bits": bits, "group_size": group_size, **options}
        only = [w.name for w in weights(model) if w.name not in foreseen.reasons]
        scales = _rounded(model, backend, method, batches, solver_options or {}, scheme, only)
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Any] = {"scales": scales} if scales else {}
    if "environment" in entry.traits:
        environment(entry.traits["environment"]).require(what=f"backend {backend}", where="quantize")
        chosen |= {"calibration": batches, "say": say}
    try:
        written = entry.value(model, tokenizer, part, bits=bits, group_size=group_size, **options, **chosen)
        if written.model is not None:
            write_expectation(written.model, part)
        write_hashes(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if written.coverage.least < WORTH_A_WARNING:
        warnings.warn(
            f"{folder} stores {written.coverage.least:.1%} of the weights in {bits} bits; left as they are: "
            + written.coverage.left_out(),
            PartlyStored,
            stacklevel=2,
        )
    return written


def _check_types(model: object, bits: object, group_size: object, batches: Iterable[object]) -> None:
    """Annotations bind nobody in a script, and what they would have caught fails deep inside."""
    if not isinstance(model, PreTrainedModel):
        raise CompressError(
            f"a loaded model is needed, not {type(model).__name__}",
            where="model",
            next_step="AutoModelForCausalLM.from_pretrained(...), or the class of your task",
        )
    for name, given, fix in (
        ("bits", bits, "bits=4, without quotes"),
        ("group_size", group_size, "group_size=32, without quotes, or None for a whole row"),
    ):
        if type(given) is not int and (given is not None or name == "bits"):
            raise CompressError(f"{given!r} is no whole number", where=name, next_step=fix)
    keys = ("input_ids", "attention_mask")
    if isinstance(batches, Mapping) or not all(isinstance(b, Mapping) and all(k in b for k in keys) for b in batches):
        raise CompressError(
            "batches are a list of dicts with input_ids and attention_mask",
            where="batches",
            next_step='batches=[tokenizer(texts, return_tensors="pt", padding=True)]',
        )


def _require_sound(model: PreTrainedModel) -> None:
    """Libraries pack NaN without a word, and a second rounding, or fail deep inside."""
    require_unquantized(model, where="quantize")
    require_one_device(model, where="quantize")
    require_finite(weights(model))


def _check_scales(
    scales: Mapping[str, Tensor],
    model: PreTrainedModel,
    backend: str,
    bits: int,
    group_size: int | None,
    options: Mapping[str, Any],
) -> None:
    known = {w.name: w for w in weights(model)}
    unknown = next((name for name in scales if name not in known), None)
    if unknown is not None:
        raise CompressError(f"no weight {unknown!r}", where="scales", next_step=did_you_mean(unknown, known))
    if scales and "grid" not in backends.entry(backend).traits:
        raise CompressError(f"{backend} finds scales of its own", where="scales", next_step="leave them out")
    grids = options.get("grids") or {}
    for name, scale in scales.items():
        own = {key: value for key, value in options.items() if key != "grids"}
        usual = backends.entry(backend).traits["grid"](bits=bits, group_size=group_size, **own)
        inputs = known[name].shape[1]
        groups = inputs // (grids.get(name, usual).group_size or inputs)
        if scale.ndim == 2 and scale.shape[1] != groups:
            raise CompressError(
                f"{scale.shape[1]} scales a row, and {backend} stores {groups} here",
                where=f"scales: {name}",
                next_step="the bits and group_size that chose the scales (of QAT: its own)",
            )


def _rounded(
    model: PreTrainedModel,
    backend: str,
    method: str,
    batches: Sequence[Batch],
    solver_options: Mapping[str, Any],
    scheme: Mapping[str, Any],
    only: list[str],
) -> dict[str, Tensor]:
    """The scales of the weights, those named in `only`, that `method` rounded in place. scheme: bits, group_size and
    the backend's options."""
    traits, makes = backends.entry(backend).traits, solvers.entry(method, where="method").traits["makes"]
    if "grid" not in traits or makes != "codes":
        raise CompressError(
            f"{backend} rounds the whole model at once, by itself"
            if "grid" not in traits
            else f"{method} prunes, it does not round",
            where="method",
            next_step="leave it out" if "grid" not in traits else "gptq, or rtn",
        )
    check_solver_options(method, solver_options, where="solver_options")
    usual = {key: value for key, value in scheme.items() if key != "grids"}
    solver = solvers[method](grid=traits["grid"](**usual), grids=scheme.get("grids"), **solver_options)
    return compress_blocks(model, list(batches), solver, only=only).scales
