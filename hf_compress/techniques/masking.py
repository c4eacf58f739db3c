"""The masks of a model while it trains: held on its gradients, its weights and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.masks import packed, unpacked
from hf_compress.weights import Weight


class Masks:
    """One boolean tensor a parameter, True = dropped, stored as the parameter is (experts stacked, Conv1D transposed).

    A dropped weight's gradient is zeroed where it arises, so neither clipping nor any optimizer's state sees it
    (Adafactor's row and column means included); `apply`, after each step, zeroes the weight and its moments.

    Args:
        weights: those that are masked.
        elsewhere: parameters (`Weight.parameter`) whose mask acts in the forward (LoRA) and not on the stored values.
    """

    def __init__(self, weights: list[Weight], elsewhere: Iterable[str] = ()) -> None:
        self.weights, self.dropped, self._elsewhere = weights, dict[str, Tensor](), frozenset(elsewhere)
        self._whole = {w.parameter: w for w in weights}  # any of its weights gives the parameter
        self._hooks = [
            weight.whole.register_hook(self._gradient_mask(name))
            for name, weight in self._whole.items()
            if weight.whole.requires_grad
        ]

    def _gradient_mask(self, name: str) -> Any:
        def mask(gradient: Tensor) -> Tensor | None:
            return self.masked(name, gradient) if self else None

        return mask

    def __bool__(self) -> bool:
        """False until the first masks are chosen."""
        return bool(self.dropped)

    def of(self, weight: Weight) -> Tensor:
        """(out, in), True = kept; all of them before the first masks are chosen."""
        if not self:
            return torch.ones(weight.shape, dtype=torch.bool, device=weight.whole.device)
        return ~weight.of(self.dropped[weight.parameter])

    def masked(self, parameter: str, values: Tensor) -> Tensor:
        """`values`, shaped like a parameter, with zeros where it is dropped; differentiable."""
        return values.masked_fill(self.dropped[parameter], 0) if parameter in self.dropped else values

    def items(self) -> dict[str, Tensor]:
        """Weight name -> (out, in), True = kept."""
        return {w.name: self.of(w) for w in self.weights} if self else {}

    def set(self, weight: Weight, mask: Tensor) -> None:
        """Take a new mask (out, in) for one weight; before `apply`, set one for every weight."""
        if weight.parameter not in self.dropped:
            self.dropped[weight.parameter] = torch.zeros_like(weight.whole, dtype=torch.bool)
        weight.of(self.dropped[weight.parameter]).copy_(~mask)

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        for name, dropped in self.dropped.items():
            if name in self._elsewhere:
                continue
            whole = self._whole[name].whole
            whole.data.masked_fill_(dropped, 0)
            if optimizer is not None:
                _zero(optimizer.state.get(whole, {}), dropped)

    def state(self) -> dict[str, Tensor]:
        """Weight name -> bits, packed."""
        return {name: packed(mask) for name, mask in self.items().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, for a model whose weights are those of the same checkpoint.

        Raises:
            CompressError: masks of other weights, of another size, or over weights that are not zero: of another
            model or another run.
        """
        self.dropped = {}
        if not state:
            return
        if set(state) != {w.name for w in self.weights}:
            odd = sorted(set(state) ^ {w.name for w in self.weights})[0]
            raise CompressError(
                "the checkpoint's masks are of other weights",
                where=odd,
                next_step="resume with the model and the recipe that were interrupted",
            )
        for weight in self.weights:
            mask = unpacked(state[weight.name], weight.shape, where=weight.name).to(weight.whole.device)
            if weight.parameter not in self._elsewhere and weight.whole.requires_grad:
                self._check_zeros(weight, mask)
            self.set(weight, mask)
        self.apply()

    @staticmethod
    def _check_zeros(weight: Weight, mask: Tensor) -> None:
        if (weight.matrix[~mask] != 0).any():
            raise CompressError(
                "the checkpoint's mask covers weights that are not zero: it is of another model or another run",
                where=weight.name,
                next_step="resume from a checkpoint whose files were written together",
            )

    def bake(self) -> None:
        """The end of the run: let go of the gradients, write every zero into the stored weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._elsewhere = [], frozenset()
        self.apply()


def _zero(moments: Mapping[str, Any], dropped: Tensor) -> None:
    """Zero the moments of dropped weights, in every state shaped like the parameter (or a stack of such).

    bitsandbytes' 8-bit moments are codes into a table: there it is the code of 0. States of other shapes (Adafactor's
    means over rows and columns) are of gradients that were masked already.
    """
    for name, moment in moments.items():
        if type(moment) is not Tensor or moment.shape[-dropped.dim() :] != dropped.shape:
            continue
        zero = 0 if moment.is_floating_point() else int(moments[f"qmap{name[-1]}"].abs().argmin())
        moment.masked_fill_(dropped, zero)
