"""A model that came quantized, as floating weights again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.bnb_guard import unfit
from hf_compress.errors import CompressError
from hf_compress.weights import is_packed

FORMATS = ("bitsandbytes", "compressed-tensors", "fp8", "torchao")
FP8_BLOCK = 128


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


def fp8_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 (out, in) times one scale for each 128 x 128 block, in bfloat16 (DeepSeek-V3,
    https://arxiv.org/abs/2412.19437, section 3.3). The last blocks may be cut short."""
    rows = scale.repeat_interleave(FP8_BLOCK, 0)[: weight.shape[0]]
    return (weight.float() * rows.repeat_interleave(FP8_BLOCK, 1)[:, : weight.shape[1]]).to(torch.bfloat16)


def write_without_fp8(files: list[Path], folder: Path) -> None:
    """A copy of a block-scaled checkpoint in bfloat16, shard by shard. (transformers 5.23 takes blocks of
    equal size: of 192 columns, 96 and 96 instead of 128 and 64; DeepSeek-V3's 576 rows of kv_a_proj_with_mqa stop it.)
    """
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            where |= dict.fromkeys(shard.keys(), file)
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as shard:
            for key in (k for k in shard.keys() if not k.endswith("_scale_inv")):  # noqa: SIM118 - no mapping
                tensors[key] = shard.get_tensor(key)
                if f"{key}_scale_inv" in where:
                    with safe_open(where[f"{key}_scale_inv"], "pt") as other:
                        tensors[key] = fp8_blocks(tensors[key], other.get_tensor(f"{key}_scale_inv"))
        save_file(tensors, folder / file.name, {"format": "pt"})
    for path in files[0].parent.glob("*.json"):
        content = json.loads(path.read_text())
        if path.name == "config.json":
            content.pop("quantization_config")
        elif path.name == "model.safetensors.index.json":
            content["weight_map"] = {k: v.name for k, v in where.items() if not k.endswith("_scale_inv")}
        (folder / path.name).write_text(json.dumps(content))
