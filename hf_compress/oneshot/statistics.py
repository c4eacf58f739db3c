"""What calibration sees of every weight matrix of a block, gathered by hooks while the block runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.criteria import Statistics
from hf_compress.weights import Weight

STARVED = 32  # an expert that saw fewer tokens is named in the report


class Gatherer:
    """Hooks on the modules of `weights` (one block's); call `statistics` after the block has run over every batch,
    then `close`.

    `keep` (set before each forward) marks the rows that are not padding: (batch * tokens,) bool.
    Rows of a routed expert are weighted by their router weight g: input_norm^2 = sum g^2 x^2, hessian = sum g^2 x x^T.
    """

    def __init__(self, weights: list[Weight], needs: Iterable[str]) -> None:
        self.weights, self.needs, self.keep = weights, frozenset(needs), torch.empty(0, dtype=torch.bool)
        self._sums: dict[str, Statistics] = {w.name: Statistics() for w in weights}
        self._hooks = []
        by_module: dict[nn.Module, list[Weight]] = {}
        for weight in weights:
            by_module.setdefault(weight.module, []).append(weight)
        for module, group in by_module.items():
            hook = self._on_experts(group) if group[0].expert is not None else self._on_linear(group)
            self._hooks.append(module.register_forward_pre_hook(hook))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_linear(self, group: list[Weight]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)[self.keep]  # MLA gives four dimensions, most give three
            for weight in group:
                self._add(weight.name, rows)

        return hook

    def _on_experts(self, group: list[Weight]) -> Any:
        up = {w.expert: w for w in group if len(w.stored) == 2}  # gate and up, stacked
        down = {w.expert: w for w in group if len(w.stored) == 1}

        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, chosen, gates = args  # (tokens, hidden), (tokens, active), (tokens, active)
            for expert, weight in up.items():
                token, place = torch.where((chosen == expert) & self.keep[:, None])
                rows, gate = hidden[token], gates[token, place].float()[:, None]
                self._add(weight.name, rows * gate)
                halves = F.linear(rows, weight.matrix).chunk(2, dim=-1)
                self._add(down[expert].name, module.act_fn(halves[0]) * halves[1] * gate)  # type: ignore[operator]

        return hook

    def _add(self, name: str, rows: Tensor) -> None:
        sums, rows = self._sums[name], rows.float()
        sums.tokens += len(rows)
        if "input_norm" in self.needs:
            square = rows.square().sum(0)
            sums.input_norm = square if sums.input_norm is None else sums.input_norm + square
        if "hessian" in self.needs:
            product = rows.T @ rows
            sums.hessian = product if sums.hessian is None else sums.hessian + product

    def statistics(self, weight: Weight) -> Statistics:
        """Of one weight; an expert that no token reached gets the sum over its layer's experts.

        `input_norm` is the norm, the square root of what was summed.
        """
        found = self._sums[weight.name]
        if found.tokens == 0 and weight.expert is not None:
            layer = [self._sums[w.name] for w in self.weights if w.parameter == weight.parameter]
            found = Statistics(0, _total([s.input_norm for s in layer]), _total([s.hessian for s in layer]))
        return Statistics(found.tokens, None if found.input_norm is None else found.input_norm.sqrt(), found.hessian)

    @property
    def starved(self) -> dict[str, int]:
        return {
            w.name: self._sums[w.name].tokens
            for w in self.weights
            if w.expert is not None and self._sums[w.name].tokens < STARVED
        }


def _total(parts: list[Tensor | None]) -> Tensor | None:
    given = [p for p in parts if p is not None]
    return torch.stack(given).sum(0) if given else None
