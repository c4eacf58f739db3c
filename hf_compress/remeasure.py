"""Are a card's numbers what this machine finds? Measures a folder again and compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_compress.card import read_facts
from hf_compress.errors import CompressError
from hf_compress.evaluation import evaluate
from hf_compress.recipe import parse

SAME = {"quality": 0.01, "agreement": 0.01, "kl_to_dense": 0.05}  # relative; another machine rounds in another order


@dataclass(frozen=True)
class Figure:
    """One number of the card and what it is here. same: within what another machine's rounding explains."""

    artefact: str
    name: str
    card: float
    here: float
    same: bool


def remeasure(folder: Path, *, dense: str | None = None) -> list[Figure]:
    """Sizes, parameters, quality and sparsity measured again; with `dense`, KL and agreement too. Times and memory
    are this machine's own and are not compared.

    Raises:
        CompressError: the folder was made in a script, without a recipe; nothing in it was measured; its data cannot
        be read here.
    """
    facts = read_facts(folder)
    if not facts.get("recipe") or facts["evaluation"] is None:
        raise CompressError(
            "the card holds no number that a recipe measured", where=str(folder), next_step="leave --remeasure out"
        )
    recipe = parse(facts["recipe"])
    assert recipe.evaluate is not None
    wanted = [m for m in recipe.evaluate.metrics if m not in ("latency", "memory") and (dense or m != "kl")]
    spec = dataclasses.replace(recipe.evaluate, metrics=wanted, compare_plain_onnx=False)
    found = evaluate(folder, dense or folder, spec=spec, data=recipe.data, task=facts["task"], seed=recipe.seed)
    before, now = facts["evaluation"]["artefacts"], found["artefacts"]
    return [
        figure
        for name in ("root", "onnx", "openvino")
        if name in now
        for figure in _figures(name, before[name], now[name])
    ]


def _figures(artefact: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[Figure]:
    for name in ("bytes", "parameters", "active_parameters", "sparsity"):
        if before.get(name) is not None and now.get(name) is not None:
            yield Figure(artefact, name, before[name], now[name], before[name] == now[name])
    for name in ("accuracy", "perplexity"):
        if name in before and name in now:
            card, here = before[name]["value"], now[name]["value"]
            yield Figure(artefact, name, card, here, abs(here - card) <= SAME["quality"] * card)
    for name in ("kl_to_dense", "agreement"):
        if name in before and name in now:
            near = abs(now[name] - before[name]) <= SAME[name] * before[name] + 1e-4
            yield Figure(artefact, name, before[name], now[name], near)
