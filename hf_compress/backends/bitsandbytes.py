"""bitsandbytes: int8 rows, or 4-bit blocks of 64 (nf4, fp4), kept small in memory too."""

from __future__ import annotations

import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.backends import Written, backends
from hf_compress.bnb_guard import BLOCK, ROWS, disable_cpu_packing, unfit
from hf_compress.coverage import coverage
from hf_compress.errors import CompressError
from hf_compress.weights import Weight, weights


def stores(
    weight: Weight, *, bits: int, group_size: int | None = None, double_quant: bool = False, **options: Any
) -> float | str:
    """Bytes on disk, or why bitsandbytes leaves this weight as it is."""
    out, width = weight.shape
    if weight.kind == "expert":
        return "stacked experts are not nn.Linear, the only thing bitsandbytes replaces"
    if why := unfit(weight.module_name, width, bits=bits):
        return why
    if bits == 4 and out % ROWS:
        return f"{out} rows are no multiple of {ROWS}: plain bitsandbytes stops at them on a CPU with AVX512-BF16"
    if bits == 8:
        return float(out * width + 4 * out)
    blocks = out * width / BLOCK  # a scale each; double_quant: in one byte, with an fp32 scale for 256 of them
    return out * width / 2 + (blocks + 4 * ceil(blocks / 256) if double_quant else 4 * blocks)


def check(*, bits: int, group_size: int | None = None, quant_type: str = "nf4", **options: Any) -> None:
    """Raise a CompressError for what this container does not have, whatever the model."""
    if bits not in (4, 8):
        raise CompressError(f"bitsandbytes stores 4 or 8 bits, not {bits}", where="bits")
    if group_size not in (None, BLOCK):
        raise CompressError(
            f"bitsandbytes has its own blocks, not groups of {group_size}",
            where="group_size",
            next_step="leave group_size out",
        )
    if quant_type not in ("nf4", "fp4"):
        raise CompressError(f"unknown 4-bit grid {quant_type!r}", where="options.quant_type", next_step="nf4 or fp4")


@backends.register(
    "bitsandbytes",
    summary="int8 and nf4/fp4 for dense models, small on disk and in memory",
    paper="https://arxiv.org/abs/2208.07339",
    disk="about 4x (int8) or 7x (4 bits) smaller than fp32 for the matrices it holds",
    memory="kept small",
    speed="near the dense model on a GPU, slower than fp32 on a CPU",
    experts="no",
    serves="transformers, vLLM, TGI",
    needs="bitsandbytes",
    check=check,
    stores=stores,
)
def bitsandbytes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    bits: int,
    group_size: int | None = None,
    dtype: str | None = None,
    quant_type: str = "nf4",
    double_quant: bool = False,
) -> Written:
    """Write `model` with its block matrices in `bits` (8, or 4) into `folder`.

    dtype: of everything else (embeddings, norms, heads), the model's own when None; quant_type: nf4 or fp4.
    Saved before any forward, because a forward may repack 4-bit weights in place.

    Raises:
        CompressError: bits or group size bitsandbytes does not have.
    """
    check(bits=bits, group_size=group_size, quant_type=quant_type)
    reasons = {w.name: str(reason) for w in weights(model) if isinstance(reason := stores(w, bits=bits), str)}
    keep = sorted({w.module_name for w in weights(model) if w.name in reasons and w.kind != "expert"} | _heads(model))
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if bits == 8
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": getattr(torch, dtype or "float32"),
        }
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as dense:
        model.save_pretrained(dense)
        packed = type(model).from_pretrained(
            dense,
            quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=keep, **options),
            dtype=getattr(torch, dtype) if dtype else model.dtype,
        )
    disable_cpu_packing(packed)
    packed.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    done = {
        module_name
        for module_name, module in packed.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    return Written(packed.eval(), coverage(model, [w.name for w in weights(model) if w.module_name in done], reasons))


def _heads(model: PreTrainedModel) -> set[str]:
    """Every Linear outside the blocks: lm_head, poolers and classifiers are small and touchy."""
    inside = {w.module_name for w in weights(model)}
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside}
