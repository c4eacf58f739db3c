"""compressed-tensors: integers in groups, stacked experts included, int8 activations too; what vLLM serves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.backends import Written, backends, check_group, dividing
from hf_compress.coverage import coverage
from hf_compress.errors import CompressError, at
from hf_compress.families import expert_options, family_of
from hf_compress.grids import Grid, codes, from_codes
from hf_compress.grids import scales as find_scales
from hf_compress.weights import Weight, stored_scales, weights


def stores(
    weight: Weight,
    *,
    bits: int,
    group_size: int | None = None,
    grids: Mapping[str, Grid] | None = None,
    **options: Any,
) -> float | str:
    """Bytes on disk (codes packed into int32, one scale a group in the weight's dtype), or why it stays as it is."""
    out, width = weight.shape
    own = (grids or {}).get(weight.name, Grid(bits, group_size))
    bits, group_size = own.bits, own.group_size
    if weight.transposed:
        return "Conv1D is not nn.Linear, the only thing compressed-tensors packs"
    if group_size is not None and width % group_size:
        return f"group_size {group_size} does not divide its {width} inputs"
    return 4.0 * out * -(-width * bits // 32) + out * (width // (group_size or width)) * weight.whole.element_size()


def grid(*, bits: int, group_size: int | None = None, activations: int | None = None) -> Grid:
    """The points this container stores, for a solver to round to."""
    return Grid(bits, group_size)


def check(
    *,
    bits: int,
    group_size: int | None = None,
    activations: int | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> None:
    """Raise a CompressError for what this container does not have, whatever the model."""
    for name, each in {"": Grid(bits, group_size), **(grids or {})}.items():
        if not 2 <= each.bits <= 8:
            raise CompressError(
                f"this container stores 2 to 8 bits, not {each.bits}",
                where=name or "bits",
                next_step="bits: 4 is usual",
            )
        check_group(each.group_size, where=name or "group_size")
    if activations is not None and grids:
        raise CompressError(
            "activations are rounded where all weights have 8 bits",
            where="options.activations",
            next_step="leave activations out, or give no weight bits of its own",
        )
    if activations is not None and (activations, bits, group_size) != (8, 8, None):
        raise CompressError(
            f"activations in {activations} bits need 8, with 8-bit weights and no group size",
            where="options.activations",
            next_step="bits: 8 and options: {activations: 8}, or leave activations as they are",
        )


MIXED = (
    "layers stand on different grids, which transformers' dequantize=True does not know: it ends in an error, or in "
    "wrong answers"
)


class Packing:
    """How a folder stores the block matrices of `model` (only its names and shapes are read, so it may be on the meta
    device).

    grids: weight name -> its own grid, where it has one. reasons: weight -> why it stays as it is.
    quantization_config: what config.json says of it. notes: what a reader of the card should know;
    warning: what would make their answers wrong.

    Raises:
        CompressError: bits below 2 or above 8; Conv1D; with experts, a group size that does not divide every matrix
        (all experts must be packed), or routed experts on more than one grid; 8-bit activations with 4-bit weights,
        groups or experts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        bits: int,
        group_size: int | None = None,
        activations: int | None = None,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        experts, found = family_of(model.config).experts, weights(model)
        check(bits=bits, group_size=group_size, activations=activations, grids=grids)
        if any(w.transposed for w in found):
            raise CompressError(
                "compressed-tensors packs nn.Linear, and this model's matrices are Conv1D",
                where=type(model).__name__,
                next_step="use bitsandbytes",
            )
        if activations is not None and experts is not None:
            raise CompressError(
                "transformers does not load stacked experts with quantized activations",
                where="quantize.options.activations",
                next_step="leave activations out: weights in 2 to 8 bits cover the experts",
            )
        self.activations = activations
        stored = {w.name: stores(w, bits=bits, group_size=group_size, grids=grids) for w in found}
        self.reasons = {name: reason for name, reason in stored.items() if isinstance(reason, str)}
        if self.reasons and experts is not None:
            name, reason = next(iter(self.reasons.items()))
            raise CompressError(
                f"with experts every matrix must be packed, and here {reason}",
                where=name,
                next_step=f"group sizes that divide all inputs: {dividing(found)}",
            )
        own = {w.name: (grids or {}).get(w.name, grid(bits=bits, group_size=group_size)) for w in found}
        self._packed = {key: own[w.name] for w in found if w.name not in self.reasons for key in w.stored}
        routed = [own[w.name] for w in found if w.kind == "expert"]
        if len(set(routed)) > 1:
            raise CompressError(
                "routed experts have more than one number of bits or group size, and transformers opens all of them "
                "with one",
                where=next(w.name for w in found if w.kind == "expert" and own[w.name] != routed[0]),
                next_step='one override for all of them, such as "experts": {bits: 4}',
            )
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        ignored = sorted(linears - {key.removesuffix(".weight") for key in self._packed})
        targets: dict[Grid, list[str]] = {}
        if experts is not None and routed and self._packed:
            targets[routed[0]] = [f"re:.*{re.escape(experts.module)}.*"]
        for key, points in self._packed.items():
            if (module := key.removesuffix(".weight")) in linears:
                targets.setdefault(points, []).append(module)
        if len(targets) < 2:
            targets = {points: ["Linear"] for points in targets or [grid(bits=bits, group_size=group_size)]}
        self.quantization_config = self._describe(ignored, targets)
        self.notes: list[str] = []
        if activations is not None:
            self.notes.append("activations are rounded to int8 wherever the folder is run, accuracy included")
        self.warning = MIXED if len(targets) > 1 else ""

    def encode(self, key: str, tensor: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """What is stored for one tensor of a plain checkpoint: itself, or codes and scales named after it.

        Raises:
            CompressError: weights that are not finite; codes that do not decode to within rounding of the tensor.
        """
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        if key not in self._packed:
            return {key: tensor}
        points = self._packed[key]
        given = scale is not None
        with at(key):
            scale = find_scales(tensor, points) if scale is None else scale.to(tensor)
        rounded = codes(tensor, scale, points).to(torch.int8)
        stored = {f"{key}_scale": scale.contiguous()}
        if self.activations is not None:
            stored[key] = rounded
        else:
            stored[f"{key}_packed"] = pack_to_int32(rounded, points.bits)
            stored[f"{key}_shape"] = torch.tensor(tensor.shape)
        back = self.decode(key, stored.__getitem__)  # what a reader will see, compared while the truth is at hand
        steps = points.groups((back.float() - tensor.float()).abs()) / scale.float().abs()[..., None]
        if not steps.max() <= (0.501 if tensor.dtype == torch.float32 else 1.01):  # 16 bits round scale and product
            raise CompressError(
                f"the packed weight is off by {float(steps.max()):.2f} steps, more than rounding explains",
                where=key,
                next_step=f"the scales were not chosen for {points.bits} bits; give those that chose them (QAT's own)"
                if given
                else "report the versions of torch and compressed-tensors",
            )
        return stored

    def decode(self, key: str, stored: Callable[[str], Tensor]) -> Tensor:
        """codes * scales, (out, in) in the dtype of the scales.

        Raises:
            KeyError: `key` was stored as it is.
        """
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        scale = stored(f"{key}_scale")
        if self.activations is not None:
            rounded = stored(key)
        else:
            shape = torch.Size(stored(f"{key}_shape").tolist())
            rounded = unpack_from_int32(stored(f"{key}_packed"), self._packed[key].bits, shape)
        return from_codes(rounded, scale)

    def _describe(self, ignored: list[str], targets: dict[Grid, list[str]]) -> dict[str, Any]:
        """One group of config.json for each grid: the layers it holds for by their full names, routed experts, which
        are no layers once they are opened, by an expression. A class beside names would be right too, but
        compressed-tensors then warns of every name."""
        inputs = None if self.activations is None else _numbers(8, dynamic=True) | {"strategy": "token"}
        groups = {}
        for number, (points, names) in enumerate(targets.items()):
            size = points.group_size
            weight = _numbers(points.bits, dynamic=False) | (
                {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
            )
            groups[f"group_{number}"] = {
                "targets": names,
                "weights": weight,
                "input_activations": inputs,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if inputs is None else "int-quantized",
            "quantization_status": "compressed",
            "ignore": ignored,
            "config_groups": groups,
        }


def _numbers(bits: int, *, dynamic: bool) -> dict[str, Any]:
    observer = None if dynamic else "minmax"
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": dynamic, "observer": observer}


@backends.register(
    "compressed-tensors",
    summary="2 to 8 bits in groups, experts included; int8 activations for dense models; what vLLM serves",
    paper="https://github.com/vllm-project/compressed-tensors",
    disk="about 4x (8 bits) or 7x (4 bits) smaller than fp32; 2 and 3 bits too",
    memory="none saved in transformers: weights are dense again after the first forward; small in vLLM",
    speed="no gain in transformers; vLLM has the kernels",
    experts="yes (weights only)",
    serves="transformers, vLLM",
    needs="compressed-tensors",
    stores=stores,
    check=check,
    grid=grid,
    packing=Packing,
    adapters=lambda model, **options: "its layers unpack at the first forward, and what is merged then is dense",
)
def compressed_tensors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    bits: int,
    group_size: int | None = None,
    activations: int | None = None,
    grids: Mapping[str, Grid] | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Written:
    """Write `model` with every block matrix as symmetric integers of `bits`, a scale for each `group_size`
    inputs (None: each row); of those in `grids`, by weight name, as their grid says.

    The values of `fake_quantize` at the absmax scale, so a model that was trained with `QAT` on the same grid is
    stored without change (8 bits in 16-bit dtypes: almost, see `grids.scales`). activations: 8 rounds the inputs of
    every packed layer to int8 too, a scale for each token as it comes. scales: weight name -> (out, groups), where a
    solver chose the grid: stored as they are.

    Raises:
        CompressError: as `Packing`.
    """
    packing = Packing(model, bits=bits, group_size=group_size, activations=activations, grids=grids)
    chosen = stored_scales(model, scales or {})
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    renamed: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            metadata = opened.metadata()
            tensors: dict[str, Tensor] = {}
            for key in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                tensors |= packing.encode(key, opened.get_tensor(key), chosen.get(key))
        renamed |= dict.fromkeys(tensors, shard.name)
        save_file(tensors, shard, metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = renamed
        content["metadata"]["total_size"] = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        index.write_text(json.dumps(content, indent=2))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = packing.quantization_config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    again = type(model).from_pretrained(folder, **expert_options(model.config))
    packed = [w.name for w in weights(model) if w.name not in packing.reasons]
    return Written(again.eval(), coverage(model, packed, packing.reasons), packing.notes, warning=packing.warning)
