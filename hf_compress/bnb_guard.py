"""What bitsandbytes gets wrong on a CPU or with some layers, and how each is kept from happening."""

from __future__ import annotations

import logging

from torch import nn

BLOCK = 64  # weights that share a scale in 4 bits

for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # it says at every layer of every forward that inputs are cast


def disable_cpu_packing(model: nn.Module) -> None:
    """Call right after loading, before any forward. Without it, one forward in eval mode makes later gradients, saves
    and dequantization silently wrong on CPUs with AVX512-BF16. Models without 4-bit layers are left as they are."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def unfit(module_name: str, width: int, *, bits: int) -> str:
    """Why a linear layer of `width` inputs must stay as it is, "" where it need not."""
    if bits == 8 and module_name.endswith("kv_b_proj"):
        return "MLA calls kv_b_proj with four dimensions, bitsandbytes int8 takes three"
    if bits == 4 and width % BLOCK:
        return f"{width} inputs are no multiple of {BLOCK}: bitsandbytes decodes them wrong on a CPU"
    return ""
