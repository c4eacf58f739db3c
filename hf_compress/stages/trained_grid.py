"""What QAT trained is what the next quantize stage stores, or the recipe is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel

from hf_compress.backends import backends
from hf_compress.errors import CompressError
from hf_compress.selection import without
from hf_compress.stages.base import Stage
from hf_compress.stages.cache import Cache
from hf_compress.stages.export import Export
from hf_compress.stages.quantize import Quantize
from hf_compress.stages.train import Train
from hf_compress.techniques.qat import QAT
from hf_compress.techniques.qat_options import METHODS
from hf_compress.weights import weights


def check_trained_grids(stages: Sequence[tuple[str, Stage]]) -> None:
    """(name, stage) in order.

    Raises:
        CompressError: a quantize stage that stores other points than the QAT before it trained, or finds the scales
        anew; a stage between them that moves the weights off the grid.
    """
    name, qat, between = "", None, ""
    for here, stage in stages:
        if isinstance(stage, Train) and stage.qat is not None:
            name, qat, between = here, stage.qat, ""
        elif isinstance(stage, Quantize):
            if qat is not None:
                _check_stores(stage, qat, name, between, where=here)
        elif not isinstance(stage, Export | Cache):
            between = between or here


def _check_stores(stage: Quantize, qat: QAT, name: str, between: str, *, where: str) -> None:
    traits, trained = backends.entry(stage.backend).traits, qat.grid
    if between:
        raise CompressError(
            f"{between} moves the weights off the grid that {name} trained",
            where=where,
            next_step=f"put {between} before {name}, or leave qat out",
        )
    if "grid" not in traits:
        raise CompressError(
            f"{stage.backend} rounds to points of its own, not those that {name} trained",
            where=f"{where}.backend",
            next_step="backend: compressed-tensors (int), or bitsandbytes (nf4, fp4)",
        )
    stored = traits["grid"](bits=stage.bits, group_size=stage.group_size, **stage.options)
    activations = stage.options.get("activations")
    follows = not METHODS[qat.method].learns and qat.freeze_after is None
    moves = stored.pinned and not trained.pinned and not follows
    wrong = {
        f"{name} trained {trained.facts()}, and {stage.backend} stores {stored.facts()} here": (
            trained.facts() != stored.facts()
        ),
        f"{name} trained {_inputs(qat.activations, qat.ranges)}, and {stage.backend} computes with "
        f"{_inputs(activations, 'token')} here": (qat.activations, qat.ranges) != (activations, "token"),
        f"{stage.backend} finds scales again as the largest weight of a group, and {name} trained others": moves,
        f"double_quant rounds the scales that {name} trained with": bool(stage.options.get("double_quant")),
        f"{stage.method} rounds anew what {name} trained": stage.method is not None,
        f"eora rounds anew what {name} trained": stage.eora is not None,
        f"streaming finds anew the scales that {name} trained": stage.streaming,
        f"overrides store some weights on another grid than {name} trained": bool(stage.overrides),
        f"a budget stores some weights on another grid than {name} trained": stage.budget is not None,
        f"smoothing moves the weights off the grid that {name} trained": stage.smooth is not None,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise CompressError(
                what, where=where, next_step="give both stages one grid (bits, group_size, kind, activations)"
            )


def _inputs(bits: int | None, ranges: str) -> str:
    return "whole activations" if bits is None else f"activations in {bits} bits by {ranges}"


def not_as_trained(qat: QAT, model: PreTrainedModel, kept: Collection[str], trained_in: torch.dtype) -> list[str]:
    """What is wrong where a container rounds weights that QAT skipped, or casts those that it trained; [] if nothing.

    model: in the dtype of the container, on the meta device too. kept: names of the weights that it leaves as they
    are.
    """
    names = [w.name for w in weights(model)]
    rounded = set(without(names, qat.skip, where="qat.skip"))
    moved = [name for name in names if name not in rounded and name not in kept]
    found = []
    if moved:
        found += [f"qat.skip left {len(moved)} weights unrounded that the container rounds ({moved[0]}); skip fewer"]
    if model.dtype != trained_in:
        now, then = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, trained_in))
        found += [f"options.dtype casts to {now} what qat trained in {then}; leave it out, or set model.dtype: {now}"]
    return found
