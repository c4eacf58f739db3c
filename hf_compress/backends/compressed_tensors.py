"""compressed-tensors: integers in groups, stacked experts included; what vLLM serves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.backends import Written, backends
from hf_compress.coverage import coverage
from hf_compress.errors import CompressError
from hf_compress.fake_quant import Grid, codes, scales
from hf_compress.families import family_of
from hf_compress.weights import Weight, weights


def stores(weight: Weight, *, bits: int, group_size: int | None = None) -> float | str:
    """Bytes on disk (codes packed into int32, one scale a group in the weight's dtype), or why it stays as it is."""
    out, width = weight.shape
    if weight.transposed:
        return "Conv1D is not nn.Linear, the only thing compressed-tensors packs"
    if group_size is not None and width % group_size:
        return f"{group_size} does not divide its {width} inputs"
    per_word = 32 // bits
    return 4.0 * out * -(-width // per_word) + out * (width // (group_size or width)) * weight.whole.element_size()


@backends.register(
    "compressed-tensors",
    summary="4 or 8 bits in groups, experts included; dense again in transformers' memory",
    paper="https://github.com/vllm-project/compressed-tensors",
    disk="about 4x (8 bits) or 7x (4 bits) smaller than fp32",
    memory="none saved in transformers: weights are dense again after the first forward; small in vLLM",
    speed="no gain in transformers; vLLM has the kernels",
    experts="yes",
    serves="transformers, vLLM",
    needs="compressed-tensors",
    stores=stores,
)
def compressed_tensors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    bits: int,
    group_size: int | None = None,
) -> Written:
    """Write `model` with every block matrix as symmetric integers of `bits` (4 or 8), a scale for each `group_size`
    inputs (None: each row).

    The values of `fake_quant` at the absmax scale, so a model that was trained with `QAT` on the same grid is stored
    without change.

    Raises:
        CompressError: other bits; with experts, a group size that does not divide every matrix (all experts must be
        packed).
    """
    if bits not in (4, 8):
        raise CompressError(f"this container stores 4 or 8 bits, not {bits}", where="quantize.bits")
    if any(w.transposed for w in weights(model)):
        raise CompressError(
            "compressed-tensors packs nn.Linear, and this model's matrices are Conv1D",
            where=type(model).__name__,
            next_step="use bitsandbytes",
        )
    reasons = {
        w.name: str(reason)
        for w in weights(model)
        if isinstance(reason := stores(w, bits=bits, group_size=group_size), str)
    }
    if reasons and family_of(model.config).experts is not None:
        name, reason = next(iter(reasons.items()))
        raise CompressError(
            f"with experts every matrix must be packed, and here {reason}",
            where=name,
            next_step="pick a group size that divides all inputs: 32, 64",
        )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    packed = {w.parameter.rsplit(".", 1)[0] for w in weights(model) if w.kind != "expert" and w.name not in reasons}
    experts = family_of(model.config).experts
    expert_key = re.compile(rf"\.{re.escape(experts.module)}\.\d+\.\w+\.weight$") if experts else None
    grid = Grid(bits, group_size)
    renamed: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            metadata = opened.metadata()
            tensors: dict[str, Tensor] = {}
            for key in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                tensor = opened.get_tensor(key)
                if key.removesuffix(".weight") in packed or (expert_key and expert_key.search(key)):
                    new = _pack(tensor, grid)
                    tensors |= {f"{key}_{part}": value for part, value in new.items()}
                    renamed |= {f"{key}_{part}": shard.name for part in new}
                else:
                    tensors[key] = tensor
                    renamed[key] = shard.name
        save_file(tensors, shard, metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = renamed
        content["metadata"]["total_size"] = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        index.write_text(json.dumps(content, indent=2))
    config = json.loads((folder / "config.json").read_text())
    ignored = sorted({w.module_name for w in weights(model) if w.name in reasons} | _unpacked_linears(model, packed))
    config["quantization_config"] = _description(bits, group_size, ignored)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    again = type(model).from_pretrained(folder, **({"experts_implementation": "eager"} if experts else {}))
    return Written(again.eval(), coverage(model, [w.name for w in weights(model) if w.name not in reasons], reasons))


def _unpacked_linears(model: PreTrainedModel, packed: set[str]) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name not in packed
    }


def _pack(matrix: Tensor, grid: Grid) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scale = scales(matrix, grid)
    return {
        "packed": pack_to_int32(codes(matrix, scale, grid), grid.bits),
        "scale": scale.contiguous(),
        "shape": torch.tensor(matrix.shape),
    }


def _description(bits: int, group_size: int | None, ignored: list[str]) -> dict[str, Any]:
    grid: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
    grid |= (
        {"strategy": "channel", "group_size": None}
        if group_size is None
        else {"strategy": "group", "group_size": group_size}
    )
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": grid, "input_activations": None, "output_activations": None}
        },
    }
