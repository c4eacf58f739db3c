"""Train with the rounding that a container will apply, so that what ships is what was trained."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_compress.errors import CompressError
from hf_compress.grids import Grid, fake_quantize, fake_quantize_ste, scales
from hf_compress.selection import without
from hf_compress.techniques.base import Technique
from hf_compress.techniques.lora import check_teacher, merge_in_forward
from hf_compress.weights import weights

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


@dataclass(eq=False)
class QAT(Technique):
    """``QAT(bits=4, group_size=32)``: every forward sees rounded weights, the gradient passes straight through to the
    real ones.

    A forward pre-hook puts the rounded tensor where the module reads its weight, a post-hook takes it away, so the
    state_dict stays plain.
    With LoRA it is W + BA that is rounded, and train() ends with the adapters merged.
    `finalize` leaves the rounded values in the weights: a container with the same grid stores exactly these codes,
    since at the absmax scale rounding twice gives the same values.
    """

    bits: int = field(default=4, metadata={"help": "bits a weight"})
    group_size: int | None = field(
        default=None, metadata={"help": "weights that share a scale along the inputs; none = a whole row"}
    )
    skip: list[str] = field(
        default_factory=list, metadata={"help": "regular expressions of weights to leave as they are"}
    )

    def check(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CompressError(f"{self.bits} bits are not between 2 and 8", where="qat.bits")
        if self.group_size is not None and self.group_size < 1:
            raise CompressError(f"group size {self.group_size} is not positive", where="qat.group_size")

    def attach(self, model: nn.Module) -> None:
        self._grid = Grid(self.bits, self.group_size)
        everything = weights(model)
        names = set(without([w.name for w in everything], self.skip, where="qat.skip"))
        self._weights = [w for w in everything if w.name in names]
        for weight in self._weights:
            scales(weight.matrix[:1], self._grid)  # the group size must divide the inputs
        self._adapted = merge_in_forward(model, self._weights, where="qat")
        modules: dict[nn.Module, set[tuple[str, bool]]] = defaultdict(set)
        for weight in self._weights:
            layer = self._adapted.get(weight.parameter)
            if layer is None:
                modules[weight.module].add((weight.attribute, weight.transposed))
            else:
                layer.changes.append(partial(_rounded, transposed=weight.transposed, grid=self._grid))
        self._hooks = []
        for module, attributes in modules.items():
            self._hooks += [
                module.register_forward_pre_hook(_shadow(sorted(attributes), self._grid)),
                module.register_forward_hook(_reveal(sorted(attributes)), always_call=True),
            ]

    def prepare(self, trainer: CompressionTrainer) -> None:
        check_teacher(trainer.techniques, self._weights, self._adapted, where="qat")

    @torch.no_grad()
    def finalize(self, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            matrix = weight.matrix
            matrix.copy_(fake_quantize(matrix, scales(matrix, self._grid), self._grid))

    def facts(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "weights": len(self._weights)}


def _shadow(attributes: list[tuple[str, bool]], grid: Grid) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        for name, transposed in attributes:
            parameter = module._parameters[name]
            assert parameter is not None
            module.__dict__[name] = _rounded(parameter, transposed=transposed, grid=grid)

    return hook


def _rounded(stored: Tensor, *, transposed: bool, grid: Grid) -> Tensor:
    rows = stored.T if transposed else stored.flatten(0, -2)  # stacked experts: (experts * out, in)
    rounded: Tensor = fake_quantize_ste(rows, grid)
    return rounded.T if transposed else rounded.view_as(stored)


def _reveal(attributes: list[tuple[str, bool]]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for name, _ in attributes:
            module.__dict__.pop(name, None)

    return hook
