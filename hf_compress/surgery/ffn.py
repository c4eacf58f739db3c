"""Cut FFN channels: the same number in every layer, because a config holds one width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.weights import blocks_of

MULTIPLE = 32  # the containers' blocks and most kernels want rows in multiples of 32


def shrink_ffn(model: PreTrainedModel, *, width: int | float) -> dict[str, Any]:
    """Keep the `width` most important FFN channels of every dense block, in place.

    Importance of channel c: the product over the FFN's matrices of the norm of their part of c, ||W_up[c]|| *
    ||W_down[:, c]|| (times ||W_gate[c]|| where gated). A share below 1 is rounded to a multiple of 32. Works on the
    meta device (keeps the first channels).

    Raises:
        CompressError: routed experts (their width is another config field), or a width that is not smaller.
    """
    family = family_of(model.config)
    if family.experts is not None:
        raise CompressError(
            "cutting the FFN width of mixture-of-experts blocks is not supported yet",
            where=f"family {family.name}",
            next_step="shrink layers instead",
        )
    now = blocks_of(model)[0].get_submodule(family.down)
    full = _matrix(now).shape[1]
    keep = (
        max(MULTIPLE, round(full * width / MULTIPLE) * MULTIPLE)
        if isinstance(width, float) and width < 1
        else int(width)
    )
    if not 0 < keep <= full:
        raise CompressError(
            f"cannot keep {keep} of {full} FFN channels",
            where="shrink.ffn",
            next_step=f"a number up to {full}, or a share below 1",
        )
    for block in blocks_of(model):
        down, ups = block.get_submodule(family.down), [block.get_submodule(name) for name in family.up]
        importance = _matrix(down).norm(dim=0)
        for up in ups:
            importance = importance * _matrix(up).norm(dim=1)
        kept = torch.arange(keep) if importance.is_meta else importance.topk(keep).indices.sort().values
        for up in ups:
            _cut(up, kept, rows=True)
        _cut(down, kept, rows=False)
    setattr(model.config, family.width, keep)
    return {"ffn_width": [full, keep]}


def _matrix(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    if not weight.is_floating_point():
        raise CompressError("packed weights cannot be cut", where="shrink", next_step="put shrink before quantize")
    return weight.data.T if isinstance(module, Conv1D) else weight.data


def _cut(module: nn.Module, kept: Tensor, *, rows: bool) -> None:
    matrix = _matrix(module)
    kept = kept.to(matrix.device)
    smaller = (matrix[kept] if rows else matrix[:, kept]).clone()
    module.weight = nn.Parameter(smaller.T.contiguous() if isinstance(module, Conv1D) else smaller)
    bias = module._parameters.get("bias")
    if rows and bias is not None:
        module.bias = nn.Parameter(bias.data[kept].clone())
    if isinstance(module, Conv1D):
        module.nf = smaller.shape[0]
    else:
        module.out_features, module.in_features = (int(n) for n in smaller.shape)  # type: ignore[assignment]
