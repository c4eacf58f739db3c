"""Every weight matrix of a model, one at a time, as (out, in): the only way the rest of the library walks a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import CompressError
from hf_compress.families import Family, family_of

COMPRESSIBLE = ("attention", "ffn", "expert", "shared_expert")
KINDS = (*COMPRESSIBLE, "router", "embedding", "head", "other")


@dataclass(frozen=True, eq=False)
class Weight:
    """A view of one weight matrix of a live model.

    Args:
        name: unique: the parameter's state_dict key, plus ``.{expert}`` for one expert of a stacked parameter.
        parameter: the state_dict key of the whole parameter.
        module, attribute: where the parameter lives: ``getattr(module, attribute)``.
        module_name: the module's qualified name.
        kind: one of `KINDS`; `COMPRESSIBLE` are the matrices of the blocks, the rest is kept by design.
        block: index of its block, None outside the blocks.
        expert: index in a stacked (experts, out, in) parameter, else None.
        transposed: stored (in, out), as GPT-2's Conv1D.
        stored: the keys of a saved checkpoint that hold its rows, in order: one, but for experts' gate and up.
    """

    name: str
    parameter: str
    module: nn.Module
    attribute: str
    module_name: str
    kind: str
    block: int | None = None
    expert: int | None = None
    transposed: bool = False
    stored: tuple[str, ...] = ()

    @property
    def whole(self) -> Tensor:
        """The parameter as registered, even while a shadow stands in for it in the module's ``__dict__``."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def of(self, tensor: Tensor) -> Tensor:
        """This weight's part of a tensor shaped like the whole parameter (a gradient, a mask), as a (out, in) view."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part.T if self.transposed else part

    @property
    def matrix(self) -> Tensor:
        """(out, in) view of the live values; writing to it in place (under no_grad) changes the model.

        Raises:
            CompressError: the values are packed by a quantizer.
        """
        if is_packed(self.whole):
            raise CompressError(
                "this weight is packed by a quantizer and has no matrix to change",
                where=self.name,
                next_step="prune, shrink and QAT come before `quantize` in a recipe",
            )
        return self.of(self.whole.data)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, width = self.of(self.whole).shape
        return int(out), int(width)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.whole.element_size()


def is_packed(tensor: Tensor) -> bool:
    """Whether a quantizer holds it: codes, or torchao's classes, which call themselves floating."""
    return not tensor.is_floating_point() or type(tensor.data).__module__.startswith("torchao.")


def rounds_inputs(tensor: Tensor) -> bool:
    """Whether torchao rounds what this weight is multiplied with: no gradient passes there."""
    return is_packed(tensor) and getattr(tensor, "act_quant_kwargs", None) is not None


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (DDP's ``module``, peft's ``get_base_model``)."""
    inner: Any = getattr(model, "module", model)
    base: PreTrainedModel = (
        inner.get_base_model() if "PeftModel" in {k.__name__ for k in type(inner).__mro__} else inner
    )
    return base


def require_finite(found: Iterable[Weight]) -> None:
    """Raise a CompressError naming the first of them that holds NaN or infinity: solvers would spread it, libraries
    pack it without a word, and activations would be blamed."""
    for weight in found:
        if not torch.isfinite(torch.stack(weight.matrix.aminmax())).all():
            raise CompressError(
                "weights are not finite",
                where=weight.name,
                next_step="check the checkpoint, or the training that made it",
            )


def require_one_device(model: nn.Module, *, where: str) -> None:
    """Raise a CompressError for a model that is spread over devices, or offloaded."""
    places = {parameter.device for parameter in model.parameters()}
    if len(places) > 1 or torch.device("meta") in places:
        raise CompressError(
            "the model lies on several devices, or is offloaded: " + ", ".join(sorted(map(str, places))),
            where=where,
            next_step='load it with device_map="cuda" or without device_map; where it fits on none, a recipe with '
            "streaming: true reads it block by block",
        )


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks, in order."""
    base = base_of(model)
    blocks = base.base_model.get_submodule(family_of(base.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def weights(model: nn.Module, kinds: Iterable[str] = COMPRESSIBLE) -> list[Weight]:
    """Every parameter with two or more dimensions whose kind is in `kinds`, in the order of the model.

    Stacked experts give one `Weight` an expert; a tied matrix is given once, as the embedding; LoRA's own matrices
    are not weights of the model. Names are those of the plain model even inside peft. Works on the meta device.

    Raises:
        CompressError: no family describes the architecture, or the family is refused.
    """
    base, wanted = base_of(model), frozenset(kinds)
    family = family_of(base.config)
    prefix = next(name for name, module in base.named_modules() if module is blocks_of(base)) + "."
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    found: list[Weight] = []
    seen: set[int] = set()
    for raw_name, module in base.named_modules():
        if "lora_" in raw_name:
            continue
        module_name = raw_name.replace(".base_layer", "")
        block: int | None = None
        local = ""
        if module_name.startswith(prefix):
            index, _, local = module_name[len(prefix) :].partition(".")
            block = int(index)
        for attribute, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = (
                "embedding"
                if isinstance(module, nn.Embedding) or module is embedding
                else "head"
                if block is None or module is head
                else _kind_in_block(family, local)
            )
            if kind not in wanted:
                continue
            key = f"{module_name}.{attribute}"
            if parameter.dim() == 3 and kind == "expert":
                assert family.experts is not None
                up = attribute == family.experts.gate_up
                names = family.experts.stored_gate_up if up else (family.experts.stored_down,)
                place = f"{prefix}{block}.{family.experts.stored}"
                for e in range(len(parameter)):
                    stored = tuple(f"{place}.{e}.{name}.weight" for name in names)
                    found.append(
                        Weight(f"{key}.{e}", key, module, attribute, module_name, kind, block, e, stored=stored)
                    )
            else:
                transposed = isinstance(module, Conv1D)
                found.append(
                    Weight(key, key, module, attribute, module_name, kind, block, None, transposed, stored=(key,))
                )
    return found


def stored_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight name -> scale (out, groups), as key of a saved checkpoint -> the scale of its rows."""
    found: dict[str, Tensor] = {}
    for weight in weights(model) if scales else []:
        if weight.name in scales:
            found |= zip(weight.stored, scales[weight.name].chunk(len(weight.stored)), strict=True)
    return found


def _kind_in_block(family: Family, local: str) -> str:
    experts = family.experts
    if experts is not None:
        if local == experts.module or local.startswith(experts.module + "."):
            return "expert"
        if local in experts.router:
            return "router"
        if experts.shared and local.startswith(experts.shared + "."):
            return "shared_expert"
    if any(local in group for group in family.attention):
        return "attention"
    return "ffn" if local in (*family.up, family.down) else "other"
