"""LoRA layers that compute with one weight, W + scaling B A, so that masks and grids act on what will be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import CompressError
from hf_compress.techniques.base import Technique
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.shadows import Change, require_read
from hf_compress.weights import Weight


class Merged:
    """Stands in for the forward of one LoRA layer (or of one parameter of stacked experts): y = x change(W + s BA)^T.

    Plain LoRA adds W x and scaling B A x apart, where no mask on the sum can act. While adapters are switched off
    (a teacher that is the student's own base) the layer computes with W as before. No state_dict key changes.
    """

    def __init__(self, layer: LoraLayer, name: str) -> None:
        self.layer, self.plain, self.changes = layer, layer.forward, list[Change]()
        self.name, self._unread = name, True
        self.attribute = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"

    def weight(self) -> Tensor:
        """W + the sum over active adapters of scaling B A, as stored, summed in fp32 and outside autocast."""
        layer = self.layer
        stored: Tensor = layer.get_base_layer()._parameters[self.attribute]
        with torch.autocast(stored.device.type, enabled=False):
            total = stored.float()
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    total = total + layer.get_delta_weight(name)
        return total

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.layer.disable_adapters:
            out: Tensor = self.plain(x, *args, **kwargs)
            return out
        base = self.layer.get_base_layer()
        changed = self.weight()
        for change in self.changes:
            changed = change(changed)
        shadow = base.__dict__[self.attribute] = changed.to(base._parameters[self.attribute].dtype)
        try:
            out = self.layer.base_layer(x, *args, **kwargs)  # the base, or for experts the layer of another parameter
        finally:
            del base.__dict__[self.attribute]
        if self._unread and shadow.requires_grad and not torch.compiler.is_compiling():
            require_read(out, shadow, where=self.name)
            self._unread = False
        return out


def merge_in_forward(model: nn.Module, weights: list[Weight], *, where: str) -> dict[str, Merged]:
    """`Weight.parameter` -> its adapted layer, which from now on computes with the merged weight; a second technique
    gets the same ones. Empty for a model without adapters.

    Raises:
        CompressError: adapters other than plain LoRA without dropout, on linear layers or stacked experts.
    """
    if not isinstance(model, PeftModel):
        return {}
    kinds = {str(config.peft_type.value) for config in model.peft_config.values()}
    if kinds != {"LORA"}:
        raise CompressError(
            f"masks and grids act on W + BA of LoRA, and these adapters are {', '.join(sorted(kinds))}",
            where=where,
            next_step="use a LoraConfig, or train the whole weights",
        )
    parameters = {(weight.module, weight.attribute): weight.parameter for weight in weights}
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            attribute = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            parameter = parameters.get((layer.get_base_layer(), attribute))
            if parameter is not None:
                _check(name, layer, where=where)
                if not isinstance(layer.forward, Merged):
                    layer.forward = Merged(layer, parameter)
                found[parameter] = layer.forward
    return found


def _check(name: str, layer: LoraLayer, *, where: str) -> None:
    wrong = {
        "adapters of this kind of layer have no single W + BA": not isinstance(layer, ParamWrapper)
        and not (type(layer) is LoraLinear and isinstance(layer.get_base_layer(), (nn.Linear, Conv1D))),
        "a variant of LoRA (DoRA or another) is not W + BA": len(layer.lora_variant) > 0,
        "dropout on the adapter's input leaves no single W + BA": any(
            isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in layer.lora_dropout.values()
        ),
        "a bias in B is not part of W + BA": any(layer.lora_bias.values()),
        "adapters are merged already": layer.merged,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise CompressError(
                what, where=f"{where}: {name}", next_step="plain LoRA with lora_dropout: 0, or skip this weight"
            )


def check_teacher(
    techniques: Sequence[Technique], weights: list[Weight], adapted: Mapping[str, Merged], *, where: str
) -> None:
    """Raise a CompressError when the student's own base is the teacher, and some of `weights` have no adapter: what is
    done to those is done to the teacher."""
    bare = [w.name for w in weights if w.parameter not in adapted]
    if adapted and bare and any(isinstance(t, Distillation) and t.learns_from_base for t in techniques):
        raise CompressError(
            f"the teacher `base` would change with the student: {len(bare)} weights have no adapter",
            where=f"{where}: {bare[0]}",
            next_step="give every weight an adapter, skip those, or load the teacher from a folder",
        )


def merged(model: nn.Module) -> nn.Module:
    """The plain model with its adapters merged, where `merge_in_forward` was at work; any other model as it is."""
    at_work = any(isinstance(module.forward, Merged) for module in model.modules())
    return model.merge_and_unload() if at_work else model  # type: ignore[operator]
