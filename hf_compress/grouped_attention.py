"""Attention of one new position where heads share keys (GQA), without a pass over the keys for each head.

torch's CPU kernel for bfloat16 goes over keys and values again for every head that reads them: most of a step's time
is spent there on SmolLM2 (9 heads, 3 with keys) at 32 rows of 400 positions, 17 ms a layer on one thread of an EPYC
with AVX512-BF16. Heads that share keys are rows of one product here: 3 to 4 ms.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "hf_compress_grouped"
ELSEWHERE = ("position_bias", "cache", "softcap")  # given any of these, ``sdpa`` computes


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (batch, heads, new, width), key and value (batch, heads with keys, positions, width) -> softmax(scaling
    Q K^T) V, (batch, new, heads, width), as transformers' ``sdpa`` gives it: that computes whatever is not one new
    position which sees all others."""
    batch, heads, new, _ = query.shape
    elsewhere = others.get("dropout") or any(others.get(key) is not None for key in ELSEWHERE)
    if new > 1 or attention_mask is not None or elsewhere:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return found
    rows = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(rows, key, value, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


def use_grouped(model: PreTrainedModel) -> None:
    """Have `model` attend by `grouped`, where it attends by ``sdpa``."""
    AttentionInterface.register(NAME, grouped)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
