"""torchao: int8 or float8 rows (or groups), int8 activations as they come; stacked experts in float8."""

from __future__ import annotations

import re
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig

from hf_compress.backends import Written, backends, check_group
from hf_compress.coverage import coverage
from hf_compress.errors import CompressError, require
from hf_compress.families import expert_options
from hf_compress.weights import Weight, is_packed, weights


def stores(
    weight: Weight,
    *,
    bits: int,
    group_size: int | None = None,
    quant_type: str = "int8",
    activations: int | None = None,
) -> float | str:
    """Bytes on disk (a byte a weight; a scale a group, of int8 with a zero point), or why it stays as it is."""
    out, width = weight.shape
    if weight.transposed:
        return "Conv1D is not nn.Linear, and torchao passes over it without a word"
    if weight.kind == "expert" and quant_type == "int8":
        return "torchao has no int8 kernel for stacked experts, only float8"
    if group_size is not None and width % group_size:
        return f"group_size {group_size} does not divide its {width} inputs"
    scale = weight.whole.element_size() + 1 if quant_type == "int8" else 4
    return float(out * width + out * (width // (group_size or width)) * scale)


def check(
    *, bits: int, group_size: int | None = None, quant_type: str = "int8", activations: int | None = None
) -> None:
    """Raise a CompressError for what this container does not have, whatever the model, and when torchao is missing."""
    if bits != 8:
        raise CompressError(
            f"torchao stores 8 bits, not {bits}: on a CPU its narrower integers take a whole byte each in the file, "
            "or have no kernel",
            where="bits",
            next_step="bits: 8, or backend: compressed-tensors",
        )
    check_group(group_size)
    if quant_type not in ("int8", "float8"):
        raise CompressError(
            f"unknown 8-bit grid {quant_type!r}", where="options.quant_type", next_step="int8 or float8"
        )
    if activations is not None and (activations, quant_type, group_size) != (8, "int8", None):
        raise CompressError(
            f"torchao rounds activations to 8 bits beside int8 rows only, not {activations} bits beside {quant_type} "
            f"{'rows' if group_size is None else f'groups of {group_size}'}; float8 activations need a GPU",
            where="options.activations",
            next_step="options: {activations: 8} alone, or leave activations as they are",
        )
    require("torchao", extra="torchao", what="the torchao container")


def adapters(
    model: PreTrainedModel,
    *,
    bits: int,
    group_size: int | None = None,
    quant_type: str = "int8",
    activations: int | None = None,
) -> str:
    """Why LoRA does not train on what it packs of `model`, "" where it does."""
    if activations is not None:
        return "torchao passes no gradient back through rounded activations"
    if quant_type == "float8" and any(w.kind == "expert" for w in weights(model)):
        return "adapters cannot be added to stacked experts in torchao's float8"
    return ""


@backends.register(
    "torchao",
    summary="int8 with or without int8 activations for dense models, float8 with stacked experts; small in memory",
    paper="https://arxiv.org/abs/2507.16099",
    disk="about 4x smaller than fp32 for the matrices it holds",
    memory="kept small",
    speed="int8 near the dense model; on a CPU float8 several times slower at batch 1, int8 activations about 20x "
    "slower without VNNI instructions",
    experts="float8 only",
    serves="transformers, vLLM",
    needs="torchao",
    check=check,
    stores=stores,
    adapters=adapters,
)
def torchao(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    bits: int,
    group_size: int | None = None,
    quant_type: str = "int8",
    activations: int | None = None,
) -> Written:
    """Write `model` with its block matrices in 8 bits, a scale for each `group_size` inputs (None: each row).

    quant_type: int8, or float8 (e4m3, which reaches stacked experts). activations: 8 rounds the inputs of every int8
    layer to int8 too, a scale for each token as it comes.

    Raises:
        CompressError: as `check`; a weight that torchao left as it was without saying so.
    """
    check(bits=bits, group_size=group_size, quant_type=quant_type, activations=activations)
    found, options = weights(model), {"quant_type": quant_type, "activations": activations}
    sizes = {w.name: stores(w, bits=bits, group_size=group_size, **options) for w in found}  # type: ignore[arg-type]
    reasons = {name: size for name, size in sizes.items() if isinstance(size, str)}
    chosen = [w for w in found if w.name not in reasons]
    covered = {w.module_name for w in chosen}
    left = sorted(n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in covered)
    kind: Any = _kind(group_size, quant_type, activations)
    if any(w.kind == "expert" for w in chosen):
        kind = _by_name(chosen, kind)
    with tempfile.TemporaryDirectory(dir=folder.parent) as dense:
        model.save_pretrained(dense)
        packed = type(model).from_pretrained(
            dense,
            quantization_config=TorchAoConfig(kind, modules_to_not_convert=left),
            dtype=model.dtype,
            **expert_options(model.config),
        )
    if silent := [w.name for w in weights(packed) if is_packed(w.whole) == (w.name in reasons)]:
        raise CompressError(
            "torchao left weights as they were, or packed others than it was told to, without a word",
            where=", ".join(silent[:3]),
            next_step="report the versions of torchao and transformers",
        )
    packed.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    notes = [] if activations is None else ["activations are rounded to int8 wherever the folder is run"]
    return Written(packed.eval(), coverage(model, [w.name for w in chosen], reasons), notes)


def _kind(group_size: int | None, quant_type: str, activations: int | None) -> Any:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
    )

    if activations is not None:
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    size = PerRow() if group_size is None else PerGroup(group_size)
    if quant_type == "float8":
        return Float8WeightOnlyConfig(granularity=size, set_inductor_config=False)
    return Int8WeightOnlyConfig(granularity=size, set_inductor_config=False, version=2)


def _by_name(chosen: list[Weight], kind: Any) -> Any:
    """The same for modules and for bare parameters (experts), which torchao takes by name only: one expression for a
    matrix in all blocks."""
    from torchao.quantization import FqnToConfig

    names = (w.parameter if w.kind == "expert" else w.module_name for w in chosen)
    patterns = ["re:" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names]
    return FqnToConfig(OrderedDict.fromkeys(patterns, kind))
