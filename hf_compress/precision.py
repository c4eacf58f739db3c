"""Where bfloat16 is the faster way to multiply, and precise enough for what is asked of calibration text."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.families import family_of
from hf_compress.grouped_attention import use_grouped


@cache
def bfloat16_is_fast(device: str) -> bool:
    """Whether the device (its type) has instructions for it; elsewhere it is slower than fp32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return device == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def calibrating(model: PreTrainedModel, device: str) -> torch.autocast:
    """In this context the matrices of an fp32 model multiply in bfloat16, accumulating in fp32, where that is faster.
    Norms and the residual stream stay fp32. Rounding is alike in both streams and far below what compression does;
    another kind of machine rounds otherwise. device: where it runs (of a model that is streamed, parts are nowhere).

    Not for routed experts on a CPU: each sees another number of tokens, and oneDNN keeps a compiled kernel for every
    shape it has met (0.6 GB more for a model of 8M parameters).
    """
    return torch.autocast(device, torch.bfloat16, enabled=_gains(model, device))


def _gains(model: PreTrainedModel, device: str) -> bool:
    routed = device == "cpu" and family_of(model.config).experts is not None
    return model.dtype == torch.float32 and bfloat16_is_fast(device) and not routed


def quick_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of an fp32 model with parameters in bfloat16 to write text with, on a CPU where that is faster (writing
    waits for weights, and half as many bytes are read), else the model itself. Buffers stay fp32: with rotary
    frequencies in bfloat16 the phase of position 512 would be off by .7 radians at a base of 100,000. It attends by
    `grouped_attention.grouped`."""
    device = model.device.type
    if device != "cpu" or getattr(model, "is_quantized", False) or not _gains(model, device):
        return model
    short = {id(p): nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False) for p in model.parameters()}
    copied = copy.deepcopy(model, short)
    use_grouped(copied)
    return copied


def rough(tensor: Tensor) -> Tensor:
    """A factor of a product that needs three digits: fp32 as bfloat16 where that multiplies faster."""
    fast = tensor.dtype == torch.float32 and bfloat16_is_fast(tensor.device.type)
    return tensor.to(torch.bfloat16) if fast else tensor
