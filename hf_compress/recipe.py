"""A recipe is data: YAML -> checked dataclasses, with every mistake named before a weight is loaded."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hf_compress.data import Data
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.evaluation import Evaluate
from hf_compress.hub import Publish
from hf_compress.source import ModelSource
from hf_compress.stages import STAGES, Stage
from hf_compress.stages.trained_grid import check_trained_grids


@dataclass
class NamedStage:
    """One entry of ``stages:``; its name is its kind unless given."""

    name: str
    kind: str
    stage: Stage


@dataclass
class Recipe:
    """A whole recipe.

    baseline: the stage whose result counts as the dense model, the one that is distilled from (`teacher_model:
    dense`) and compared with; ``source``: the model as it came. license: of the result, for the card. publish: where
    the finished folder goes at the end.
    """

    name: str
    model: ModelSource
    stages: list[NamedStage]
    data: Data | None = None
    evaluate: Evaluate | None = None
    publish: Publish | None = None
    baseline: str = "source"
    seed: int = 0
    license: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


_SECTIONS = {
    "name": str,
    "model": ModelSource,
    "data": Data,
    "stages": list,
    "evaluate": Evaluate,
    "publish": Publish,
    "baseline": str,
    "seed": int,
    "license": str,
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 2:4 is a word (1.1 reads base sixty, 124) and 2e-5 is a number (1.1 reads a word)."""


_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    inside = Path(str(files("hf_compress"))) / "recipes"
    folder = inside if inside.is_dir() else Path(str(files("hf_compress"))).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, with ``path=value`` overrides
    (``stages.distil.args.max_steps=10``).

    Raises:
        CompressError: no such file; not YAML; unknown keys, types, stages, criteria, backends; an order of stages
        that cannot work.
    """
    file = Path(path) if Path(path).suffix in {".yaml", ".yml"} else shipped().get(path, Path(path))
    if not file.is_file():
        raise CompressError(
            f"no recipe {path!r}", where=str(file), next_step="a .yaml file, or a shipped one: " + ", ".join(shipped())
        )
    try:
        raw = yaml.load(file.read_text(), _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(file)
        raise CompressError(f"the recipe is not YAML: {problem or error}", where=place) from error
    if not isinstance(raw, dict):
        raise CompressError(
            "a recipe is a mapping of sections", where=str(file), next_step="sections: " + ", ".join(_SECTIONS)
        )
    for override in overrides or []:
        _override(raw, override)
    return parse(raw)


def parse(raw: dict[str, Any]) -> Recipe:
    """Check a mapping and build the recipe; see `load`."""
    for key in raw:
        if key not in _SECTIONS:
            raise CompressError(
                f"unknown section {key!r}", where="recipe", next_step=did_you_mean(str(key), _SECTIONS)
            )
    for key in ("name", "model", "stages"):
        if key not in raw:
            raise CompressError(f"the recipe has no {key!r}", where="recipe")
    if not isinstance(raw["stages"], list) or not all(isinstance(entry, str | dict) for entry in raw["stages"]):
        raise CompressError(
            "stages is a list: each line begins with a dash", where="stages", next_step="- prune: {sparsity: 0.5}"
        )
    stages: list[NamedStage] = []
    for index, entry in enumerate(raw["stages"]):
        entry = {entry: {}} if isinstance(entry, str) else dict(entry)
        name = entry.pop("name", None)
        if len(entry) != 1:
            raise CompressError(
                "a stage is one kind and its options (and a name)",
                where=f"stages[{index}]",
                next_step="kinds: " + ", ".join(STAGES),
            )
        ((kind, options),) = entry.items()
        if kind not in STAGES:
            raise CompressError(
                f"unknown stage {kind!r}", where=f"stages[{index}]", next_step=did_you_mean(kind, STAGES)
            )
        stage = _build(STAGES[kind], options or {}, f"stages[{index}].{kind}")
        stage.check([s.kind for s in stages], where=f"stages[{index}].{kind}")
        name = name or (kind if all(s.name != kind for s in stages) else f"{kind}-{index + 1}")
        if (
            name in {s.name for s in stages} | {"source", "dense"}
            or not str(name).replace("-", "").replace("_", "").isalnum()
        ):
            raise CompressError(f"stage name {name!r} is taken or not a plain word", where=f"stages[{index}].name")
        stages.append(NamedStage(name, kind, stage))
    built: dict[str, Any] = {
        key: _build(_SECTIONS[key], raw[key], key)
        for key in ("model", "data", "evaluate", "publish")
        if raw.get(key) is not None
    }
    plain = {
        key: _typed(_SECTIONS[key], raw[key], key)
        for key in ("name", "baseline", "seed", "license")
        if raw.get(key) is not None
    }
    check_trained_grids([(s.name, s.stage) for s in stages])
    recipe = Recipe(stages=stages, raw=raw, **built, **plain)
    names = ["source", *(s.name for s in stages)]
    if recipe.baseline not in names:
        raise CompressError(
            f"baseline {recipe.baseline!r} is no stage",
            where="baseline",
            next_step=did_you_mean(recipe.baseline, names),
        )
    if recipe.evaluate is not None:
        recipe.evaluate.check()
    if recipe.publish is not None:
        recipe.publish.check()
    if recipe.data is None and (
        any(s.kind == "train" for s in stages) or (recipe.evaluate and "quality" in recipe.evaluate.metrics)
    ):
        raise CompressError("training and measuring quality need data", where="data", next_step="add a data: section")
    return recipe


def _build(kind: Any, options: Any, where: str) -> Any:
    """A dataclass from a mapping: unknown keys and wrong types are errors with their path."""
    _check_keys(kind, options, where)
    return _typed(kind, options, where)


def _check_keys(kind: Any, options: Any, where: str) -> None:
    if not isinstance(options, dict):
        raise CompressError(
            f"{where} must be a mapping, not {type(options).__name__}", where=where, next_step="key: value below it"
        )
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise CompressError(
                f"unknown key {key!r}", where=f"{where}.{key}", next_step=did_you_mean(str(key), known)
            )
        inner = next((t for t in typing.get_args(hints[key]) if dataclasses.is_dataclass(t)), None)
        if inner is not None and value is not None:
            _check_keys(inner, value, f"{where}.{key}")


def _typed(kind: Any, value: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = [part for part in first["loc"] if part in _words(value) or first["type"] == "missing"]
        if first["type"] == "missing":
            raise CompressError(f"the key {path[-1]!r} is needed", where=where, next_step=_help(kind, path)) from error
        raise CompressError(
            f"{first['msg']} (got {first['input']!r})",
            where=".".join([where, *map(str, path)]),
            next_step=_help(kind, path),
        ) from error


def _help(kind: Any, path: list[int | str]) -> str:
    """What a dataclass says of the field at the end of a path, or of the last one on the way that it knows."""
    found = ""
    for name in path:
        named = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if name in named and "help" in named[str(name)].metadata:
            found = f"{name}: {named[str(name)].metadata['help']}"
        hint = typing.get_type_hints(kind).get(str(name)) if name in named else None
        kind = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
    return found


def _words(value: Any) -> set[Any]:
    """Keys and indexes of a nested mapping, to tell them from the names pydantic gives to the branches of a union."""
    if isinstance(value, dict):
        return set(value) | {w for v in value.values() for w in _words(v)}
    return set(range(len(value))) if isinstance(value, list) else set()


def _override(raw: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals:
        raise CompressError(
            f"--set takes path=value, not {text!r}",
            where="--set",
            next_step="for example --set model.id=my-org/my-model",
        )
    node: Any = raw
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            match = [
                i
                for i, entry in enumerate(node)
                if key in (str(i), entry.get("name") if isinstance(entry, dict) else entry)
            ]
            if not match:
                match = [i for i, entry in enumerate(node) if isinstance(entry, dict) and key in entry]
            if not match:
                words = {word for entry in node for word in ([entry] if isinstance(entry, str) else entry)} - {"name"}
                words |= {entry["name"] for entry in node if isinstance(entry, dict) and "name" in entry}
                raise CompressError(
                    f"no stage {key!r}",
                    where=f"--set {text}",
                    next_step=f"name a stage by its name, kind or number; {did_you_mean(key, words)}",
                )
            entry = node[match[0]]
            node = entry if last or keys[depth + 1] in entry else next(v for k, v in entry.items() if k != "name")
        elif last:
            node[key] = yaml.load(value, _Loader)
        else:
            node = node.setdefault(key, {})
            if not isinstance(node, (dict, list)):
                raise CompressError(f"{key!r} holds a value, not options", where=f"--set {text}")
