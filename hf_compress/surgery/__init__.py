"""Remove parts of a model for real and fix its config, so that stock classes load the result."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_compress.surgery.ffn import shrink_ffn
from hf_compress.surgery.layers import drop_layers

__all__ = ["drop_layers", "shrink", "shrink_ffn"]


def shrink(
    model: PreTrainedModel, *, layers: list[int] | int | float | None = None, ffn: int | float | None = None
) -> dict[str, Any]:
    """``shrink(model, layers=[0, 2, 3, 5], ffn=512)``: keep these layers and so many FFN channels, in place; facts.

    layers: indexes, a number, or a share below 1; ffn: a number, or a share below 1, the same in every layer.

    Raises:
        CompressError: as `drop_layers` and `shrink_ffn`.
    """
    before, facts = model.num_parameters(), dict[str, Any]()
    if layers is not None:
        facts |= drop_layers(model, keep=layers)
    if ffn is not None:
        facts |= shrink_ffn(model, width=ffn)
    return facts | {"parameters_before": before, "parameters_after": model.num_parameters()}
