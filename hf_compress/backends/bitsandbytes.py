"""bitsandbytes: int8 rows, or 4-bit blocks of 64 (nf4, fp4), kept small in memory too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.backends import Written, backends
from hf_compress.bnb_guard import BLOCK, ROWS, disable_cpu_packing, unfit
from hf_compress.coverage import coverage
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.grids import Grid, codes, from_codes
from hf_compress.source import DTYPES
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


def check(
    *,
    bits: int,
    group_size: int | None = None,
    dtype: str | None = None,
    quant_type: str = "nf4",
    double_quant: bool = False,
) -> None:
    """Raise a CompressError for what this container does not have, whatever the model."""
    if bits not in (4, 8):
        raise CompressError(
            f"bitsandbytes stores 4 or 8 bits, not {bits}",
            where="bits",
            next_step="bits: 4 or 8, or backend: compressed-tensors for 2 to 8",
        )
    if dtype not in (None, *DTYPES):
        raise CompressError(
            f"unknown dtype {dtype!r}", where="options.dtype", next_step=did_you_mean(str(dtype), DTYPES)
        )
    if bits == 8 and (group_size is not None or quant_type != "nf4" or double_quant):
        raise CompressError(
            "bitsandbytes' int8 has one scale for each row: no group size, quant_type or double_quant",
            where="bits",
            next_step="leave them out, or bits: 4",
        )
    if group_size not in (None, BLOCK):
        raise CompressError(
            f"bitsandbytes has its own blocks, not groups of {group_size}",
            where="group_size",
            next_step="leave group_size out",
        )
    if quant_type not in ("nf4", "fp4"):
        raise CompressError(f"unknown 4-bit grid {quant_type!r}", where="options.quant_type", next_step="nf4 or fp4")


def grid(
    *,
    bits: int,
    group_size: int | None = None,
    dtype: str | None = None,
    quant_type: str = "nf4",
    double_quant: bool = False,
) -> Grid:
    """The points that bitsandbytes stores, for a solver to round to: it finds every scale again as max |w|, and makes
    of it what `settle` says: fp16 for int8 rows; for 4 bits rounded to `dtype`, and with double_quant to 8 bits in
    blocks of 256 around the matrix's mean."""

    def settle(scale: Tensor) -> Tensor:
        if bits == 8:
            return ((scale.float() * 127).half().float() / 127).to(scale.dtype)
        found = scale.to(getattr(torch, dtype)).float() if dtype else scale.float()
        return (_doubly_quantized(found) if double_quant else found).to(torch.float32 if double_quant else scale.dtype)

    return (
        Grid(8, None, "int", pinned=True, settle=settle)
        if bits == 8
        else Grid(4, BLOCK, quant_type, pinned=True, settle=settle)
    )


def _doubly_quantized(absmax: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    flat = absmax.flatten()
    offset = flat.mean()
    packed, state = quantize_blockwise(flat - offset, blocksize=256)
    found: Tensor = dequantize_blockwise(packed, state) + offset
    return found.view_as(absmax)


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
    grid=grid,
    adapters=lambda model, **options: "",
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
    scales: Mapping[str, Tensor] | None = None,
) -> Written:
    """Write `model` with its block matrices in `bits` (8, or 4) into `folder`.

    dtype: of everything else (embeddings, norms, heads), the model's own when None; quant_type: nf4 or fp4.
    scales: weight name -> (out, groups), where a solver rounded to `grid`: bitsandbytes then stores its very codes.
    Saved before any forward, because a forward may repack 4-bit weights in place.

    Raises:
        CompressError: bits or group size bitsandbytes does not have; codes that are not those of the solver.
    """
    check(bits=bits, group_size=group_size, dtype=dtype, quant_type=quant_type, double_quant=double_quant)
    points = grid(bits=bits, dtype=dtype, quant_type=quant_type, double_quant=double_quant)
    reasons = {w.name: str(reason) for w in weights(model) if isinstance(reason := stores(w, bits=bits), str)}
    keep = sorted({w.module_name for w in weights(model) if w.name in reasons and w.kind != "expert"} | _heads(model))
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if bits == 8
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": getattr(torch, dtype) if dtype else model.dtype,
        }
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as dense:
        with _as_encoded(model, scales or {}, points):
            model.save_pretrained(dense)
        packed = type(model).from_pretrained(
            dense,
            quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=keep, **options),
            dtype=getattr(torch, dtype) if dtype else model.dtype,
        )
    disable_cpu_packing(packed)
    _check_codes(packed, model, scales or {}, points)
    packed.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    done = {
        module_name
        for module_name, module in packed.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    return Written(packed.eval(), coverage(model, [w.name for w in weights(model) if w.module_name in done], reasons))


@contextmanager
def _as_encoded(model: PreTrainedModel, scales: Mapping[str, Tensor], points: Grid) -> Iterator[None]:
    """Inside, weights that a solver rounded hold level * scale as bitsandbytes is to find it; outside, level * what it
    makes of the scale. It encodes by the one and decodes by the other. Memory: a copy of the weights whose scale it
    changes (int8, double_quant, a dtype)."""
    kept: list[tuple[Weight, Tensor]] = []
    try:
        for weight in (w for w in weights(model) if w.name in scales):
            scale = scales[weight.name]
            encoded = from_codes(codes(weight.matrix, points.stored(scale), points), scale).to(weight.matrix.dtype)
            if not torch.equal(encoded, weight.matrix):
                kept.append((weight, weight.matrix.clone()))
                weight.matrix.copy_(encoded)
        yield
    finally:
        for weight, before in kept:
            weight.matrix.copy_(before)


def _check_codes(packed: PreTrainedModel, model: PreTrainedModel, scales: Mapping[str, Tensor], points: Grid) -> None:
    """Raise unless what is stored decodes to what the solver chose."""
    from bitsandbytes.functional import dequantize_4bit

    for weight in weights(model):
        if weight.name not in scales:
            continue
        layer: Any = packed.get_submodule(weight.module_name)
        found = (
            layer.weight.data.float() * layer.weight.SCB[:, None] / 127
            if points.bits == 8
            else dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        )
        wanted = weight.matrix.float().to(found.device)
        off = float((found.float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not off <= 0.01:  # half a step is at least three times that; rounding to 16 bits less than half of it
            raise CompressError(
                f"the stored weight differs from the one that was chosen by {off:.1%} of its largest value",
                where=weight.name,
                next_step="report the versions of torch and bitsandbytes",
            )


def _heads(model: PreTrainedModel) -> set[str]:
    """Every Linear outside the blocks: lm_head, poolers and classifiers are small and touchy."""
    inside = {w.module_name for w in weights(model)}
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside}
