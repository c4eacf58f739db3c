"""What can be named in a recipe: each registry's entries, and the keys of each section."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from itertools import groupby
from typing import Any

from hf_compress.backends import backends
from hf_compress.backends import options_of as backend_options
from hf_compress.criteria import criteria
from hf_compress.data import Data
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.evaluation import Evaluate
from hf_compress.families import families
from hf_compress.hub import Publish
from hf_compress.losses import losses
from hf_compress.losses import options_of as loss_options
from hf_compress.oneshot.solvers import options_of as solver_options
from hf_compress.oneshot.solvers import solvers
from hf_compress.recipe import shipped
from hf_compress.registry import Entry, Registry
from hf_compress.source import ModelSource
from hf_compress.stages import STAGES
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT

OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "backends": backend_options,
    "losses": loss_options,
    "solvers": solver_options,
}


REGISTRIES: dict[str, Registry[Any]] = {
    "losses": losses,
    "criteria": criteria,
    "backends": backends,
    "families": families,
    "solvers": solvers,
}


SECTIONS: dict[str, Any] = STAGES | {
    "model": ModelSource,
    "data": Data,
    "evaluate": Evaluate,
    "publish": Publish,
    "distill": Distillation,
    "prune-in-training": Pruning,
    "qat": QAT,
}


def explained(name: str) -> list[list[str]]:
    """What ``hf-compress list NAME`` says of every entry of that name (a solver and a backend may share one): its
    paragraphs, each indented as it is meant."""
    return [
        [
            f"{registry.kind} {entry.name}: {entry.summary}{_options(what, entry.name)}",
            *_asked(what, entry),
            *(_paragraphs(inspect.getdoc(entry.value) or "") if callable(entry.value) else []),
            *([entry.paper] if entry.paper else []),
        ]
        for what, registry in REGISTRIES.items()
        for entry in registry
        if entry.name == name
    ]


def _asked(what: str, entry: Entry[Any]) -> list[str]:
    """How a recipe asks for it."""
    if what == "backends":
        options = backend_options(entry.name)
        more = f", options: {{{next(iter(options))}: ...}}" if options else ""
        return [f"in a recipe: - quantize: {{backend: {entry.name}, bits: ...{more}}}"]
    if what == "solvers":
        stage = "quantize" if entry.traits["makes"] == "codes" else "prune"
        return [f"in a recipe: - {stage}: {{method: {entry.name}, ...}}"]
    return []


def _paragraphs(docstring: str) -> list[str]:
    """Lines of one indent joined, and begun anew where the next argument is described."""
    found: list[str] = []
    for block in docstring.split("\n\n"):
        for indent, lines in groupby(block.splitlines(), key=lambda line: len(line) - len(line.lstrip())):
            text = " ".join(line.strip() for line in lines)
            found += [" " * indent + part for part in re.split(r"(?<=[.;]) (?=[a-z_]+(?:, [a-z_]+)*: )", text)]
    return found


def overview() -> list[tuple[str, str]]:
    """What can be listed, each with the names in it: rows of ``hf-compress list`` alone."""
    kinds = (*REGISTRIES, "techniques", "stages", "recipes")
    found = [(kind, ", ".join(name for name, *_ in listing(kind))) for kind in kinds]
    return [*found, ("sections", ", ".join(SECTIONS))]


def listing(what: str) -> list[tuple[str, str, str]]:
    """Rows of ``hf-compress list``; the README prints them too."""
    if what in REGISTRIES:
        named = REGISTRIES[what]
        return [(e.name, _asked_by(e) + e.summary + _options(what, e.name), e.paper) for e in named]
    if what == "recipes":
        return [(name, path.read_text().splitlines()[0].lstrip("# "), "") for name, path in shipped().items()]
    if what == "techniques":
        found = (Distillation, Pruning, QAT)
        return [(kind.__name__, (sys.modules[kind.__module__].__doc__ or "").strip(), "") for kind in found]
    if what == "stages":
        return [
            (name, " ".join((sys.modules[kind.__module__].__doc__ or "").split()), "") for name, kind in STAGES.items()
        ]
    if what in SECTIONS:
        return [(f.name, f.metadata.get("help", ""), _default(f)) for f in dataclasses.fields(SECTIONS[what])]
    if rows := keys(what):
        return rows
    names = {entry.name for registry in REGISTRIES.values() for entry in registry}
    raise CompressError(
        f"nothing to list called {what!r}",
        next_step=did_you_mean(what, {*REGISTRIES, "recipes", "stages", "techniques", *SECTIONS, *names}),
    )


def keys(name: str) -> list[tuple[str, str, str]]:
    """The keys of that name, with the section or the loss, backend or solver each is of, as rows of ``hf-compress
    list``."""
    fields = [(section, f) for section, kind in SECTIONS.items() for f in dataclasses.fields(kind)]
    return [
        (f"{where}: {f.name}", f.metadata.get("help", ""), _default(f)) for where, f in fields if f.name == name
    ] + [
        (f"{REGISTRIES[what].kind} {entry.name}: {name}", _described(entry, name), str(options(entry.name)[name]))
        for what, options in OPTIONS.items()
        for entry in REGISTRIES[what]
        if name in options(entry.name)
    ]


def _described(entry: Entry[Any], option: str) -> str:
    """What the docstring of an entry says of an option; of the entry, where it says nothing."""
    lines = (text.strip().partition(": ") for text in _paragraphs(inspect.getdoc(entry.value) or ""))
    return next((text for names, _, text in lines if option in names.split(", ")), entry.summary)


def _asked_by(entry: Entry[Any]) -> str:
    """The key of `distill` that a loss is a value of."""
    kind = entry.traits.get("kind")
    return "" if kind is None else "loss: " if kind in ("logits", "values") else "features: "


def _options(what: str, name: str) -> str:
    defaults = OPTIONS[what](name) if what in OPTIONS else {}
    return f"; options: {', '.join(f'{key} ({value})' for key, value in defaults.items())}" if defaults else ""


def _default(field: dataclasses.Field[object]) -> str:
    """A recipe key's default as one writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "needed" if field.default is dataclasses.MISSING else str(field.default)
