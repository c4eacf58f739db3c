"""Terms that make what happens inside the student's blocks like what happens inside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.losses import losses
from hf_compress.techniques.capture import Capture, has
from hf_compress.weights import base_of, blocks_of

LayerMap = list[tuple[int, int]]
"""(student block, teacher block) pairs."""


def layer_map(given: list[int] | str | None, ours: int, theirs: int, *, where: str) -> LayerMap:
    """None or ``uniform``: every student block with an evenly spaced one; ``last``: the last ones; a list: the teacher
    block of each student block.

    Raises:
        CompressError: a list that does not fit, a word that is none of these.
    """
    if given in (None, "uniform"):
        return [(i, max(0, round((i + 1) * theirs / ours) - 1)) for i in range(ours)]
    if given == "last":
        return [(ours - 1, theirs - 1)]
    if isinstance(given, str):
        raise CompressError(
            "the record of a shrink stage is known inside a recipe only"
            if given == "record"
            else f"unknown layer map {given!r}",
            where=where,
            next_step="uniform, last, or a list of block indexes: shrink(...) returns one as `kept_layers`",
        )
    assert given is not None
    if len(given) != ours or not all(0 <= t < theirs for t in given):
        raise CompressError(
            f"layer_map {given} does not map {ours} student blocks to some of {theirs} teacher blocks",
            where=where,
            next_step="give a list of block indexes, uniform, or last",
        )
    return list(enumerate(given))


@dataclass(eq=False)
class FeatureTerm:
    """One entry of `Distillation.features`: a loss, its weight, pairs of blocks, and projections where widths
    differ."""

    name: str
    weight: float
    pairs: LayerMap
    options: dict[str, Any]
    weight_end: float | None = None
    projections: nn.ModuleList = field(default_factory=nn.ModuleList)

    @property
    def kind(self) -> str:
        kind: str = losses.entry(self.name).traits["kind"]
        return kind

    def __call__(self, student: Capture, teacher: Capture, mask: Tensor) -> Tensor:
        """(batch,): the mean over pairs of blocks."""
        shape = (mask.shape[0], mask.shape[1])
        total = torch.zeros(len(mask), device=mask.device)
        for index, (ours, theirs) in enumerate(self.pairs):
            mine = student.at((self.kind, ours), shape)
            if len(self.projections):
                mine = self.projections[index](mine.to(self.projections[index].weight.dtype))
            total = total + losses[self.name](mine, teacher.at((self.kind, theirs), shape), mask, **self.options)
        return total / len(self.pairs)


def feature_terms(
    given: Mapping[str, Any], student: nn.Module, teacher: nn.Module, default_map: list[int] | str | None
) -> list[FeatureTerm]:
    """Terms from ``{loss: weight}`` or ``{loss: {weight:, layer_map:, option:}}``.

    Raises:
        CompressError: see `check_features`; a layer map that does not fit the models.
    """
    ours, theirs = base_of(student), base_of(teacher)
    terms = []
    for name, options in given.items():
        chosen = dict(options) if isinstance(options, Mapping) else {"weight": options}
        entry = losses.entry(name)
        wanted = chosen.pop("layer_map", default_map)
        pairs = layer_map(wanted, len(blocks_of(ours)), len(blocks_of(theirs)), where=f"distill.features.{name}")
        if entry.traits["kind"] == "router":  # the first blocks may be dense
            evenly = wanted in (None, "uniform")
            pairs = [
                p for p in pairs if (all if evenly else any)((_routed(ours, p[0]), _routed(theirs, p[1])))
            ] or pairs
        weight, end = float(chosen.pop("weight", 1.0)), chosen.pop("weight_end", None)
        term = FeatureTerm(name, weight, pairs, chosen, end)
        widths = ours.config.hidden_size, theirs.config.hidden_size
        if entry.traits.get("project") and widths[0] != widths[1]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same on every rank
                term.projections = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in pairs)
        terms.append(term)
    return terms


def _routed(model: Any, block: int) -> bool:
    experts = family_of(model.config).experts
    return experts is not None and has(blocks_of(model)[block], experts.router[0])


def check_features(given: Mapping[str, Any]) -> None:
    """Raise a CompressError for what is wrong whatever the models: unknown losses, kinds, options, weights."""
    for name, options in given.items():
        where = f"distill.features.{name}"
        traits = losses.entry(name, where=where).traits
        if traits["kind"] in ("logits", "values"):
            raise CompressError(f"{name!r} is not about features", where=where, next_step=f"loss: {name}")
        chosen = options if isinstance(options, Mapping) else {"weight": options}
        known = ("weight", "weight_end", "layer_map", *traits.get("options", ()))
        for key in chosen:
            if key not in known:
                raise CompressError(f"unknown option {key!r}", where=where, next_step="known: " + ", ".join(known))
        for key in ("weight", "weight_end"):
            if not isinstance(chosen.get(key, 1.0), int | float) or not chosen.get(key, 1.0) >= 0:
                raise CompressError(
                    f"{chosen[key]!r} is no weight", where=where, next_step=f"features: {{{name}: 0.5}}"
                )
        for key in traits.get("options", ()):
            if type(chosen.get(key, 1)) is not int or chosen.get(key, 1) < 1:
                raise CompressError(f"{chosen[key]!r} is no whole number above 0", where=f"{where}.{key}")
