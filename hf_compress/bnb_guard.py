"""What bitsandbytes gets wrong on a CPU or with some layers, and how each is kept from happening."""

from __future__ import annotations

import logging

from torch import nn

from hf_compress.errors import CompressError

BLOCK = 64  # weights that share a scale in 4 bits
ROWS = 32  # that the repacking of `disable_cpu_packing` takes at once

for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # it says at every layer of every forward that inputs are cast


def disable_cpu_packing(model: nn.Module) -> None:
    """Call right after loading, before any forward. Without it, one forward in eval mode makes later gradients, saves
    and dequantization silently wrong on CPUs with AVX512-BF16. Models without 4-bit layers are left as they are.

    Raises:
        CompressError: a forward repacked a weight before.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise CompressError(
                    "a forward has repacked this 4-bit weight: gradients through it and what is saved of it are wrong",
                    where=name,
                    next_step="load the model again and hand it over before its first forward",
                )
            module.support_avx512bf16_for_cpu = False


def allow_cpu_packing(model: nn.Module) -> bool:
    """The end of `disable_cpu_packing`, for a model that will only be timed: on CPUs with AVX512-BF16 its next forward
    repacks it, as it does for whoever opens the folder with bitsandbytes alone. (SmolLM2-135M in NF4 takes .71
    times as long as in fp32 to decode there, unpacked 1.6; for a prompt of 128 1.7, unpacked 1.2.) Whether it will."""
    from bitsandbytes.nn import modules

    found = [module for module in model.modules() if isinstance(module, modules.Linear4bit)]
    packs = bool(found) and modules.has_avx512bf16()
    for module in found:
        module.support_avx512bf16_for_cpu = packs and module.out_features % ROWS == 0  # others it fails on
    return packs


def unfit(module_name: str, width: int, *, bits: int) -> str:
    """Why a linear layer of `width` inputs must stay as it is, "" where it need not."""
    if bits == 8 and module_name.endswith("kv_b_proj"):
        return "MLA calls kv_b_proj with four dimensions, bitsandbytes int8 takes three"
    if bits == 4 and width % BLOCK:
        return f"{width} inputs are no multiple of {BLOCK}: bitsandbytes decodes them wrong on a CPU"
    return ""
