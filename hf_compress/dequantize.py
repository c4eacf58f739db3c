"""A model that came quantized, as floating weights again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.bnb_guard import unfit
from hf_compress.errors import CompressError
from hf_compress.weights import is_packed

FORMATS = ("bitsandbytes", "compressed-tensors", "fp8", "torchao")


@torch.no_grad()
def dequantized(packed: PreTrainedModel) -> PreTrainedModel:
    """The same class with what the codes stand for, in the dtype of the other weights. What rounding lost stays lost;
    rounding of activations is gone.

    Raises:
        CompressError: 4-bit weights that bitsandbytes decodes wrong.
    """
    config = copy.deepcopy(packed.config)
    config.__dict__.pop("quantization_config", None)
    dense: PreTrainedModel = type(packed)(config).to(packed.dtype)
    held = dict(packed.named_modules())
    for key, target in dense.state_dict().items():
        module, _, attribute = key.rpartition(".")
        values = _values(held[module], attribute, key)
        turned = isinstance(dense.get_submodule(module), Conv1D) and isinstance(held[module], nn.Linear)
        target.copy_(values.T if turned and attribute == "weight" else values)
    return dense.eval()


def _values(module: nn.Module, attribute: str, key: str) -> Tensor:
    tensor: Any = getattr(module, attribute)
    kind = type(module).__name__
    if attribute == "weight" and kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        if why := unfit(key, module.in_features, bits=4):  # type: ignore[arg-type]
            raise CompressError(why, where=key, next_step="start from the model before it was quantized")
        found: Tensor = dequantize_4bit(tensor.data, tensor.quant_state)
        return found
    if attribute == "weight" and kind == "Linear8bitLt":
        rows: Tensor = tensor.CB.float() * tensor.SCB.float()[:, None] / 127
        return rows
    whole: Tensor = tensor.dequantize() if tensor.is_floating_point() and is_packed(tensor) else tensor
    return whole
