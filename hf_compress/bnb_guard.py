"""Keep bitsandbytes' 4-bit layers from repacking their weights in place on AVX512-BF16 CPUs."""

from __future__ import annotations

import logging

from torch import nn

for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # it says at every layer of every forward that inputs are cast


def disable_cpu_packing(model: nn.Module) -> None:
    """Call right after loading, before any forward. Without it, one forward in eval mode makes later gradients, saves
    and dequantization silently wrong on CPUs with AVX512-BF16. Models without 4-bit layers are left as they are."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
