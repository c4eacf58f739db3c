"""What the matrices of a block read while it runs: hooks on their modules, in the compressed model and the dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.oneshot.order import InputGroup
from hf_compress.oneshot.statistics import Sums, featureless, pooled, shrunk

STARVED = 32  # an expert that saw fewer tokens is named in the report

Reading = dict[nn.Module, tuple[Tensor, ...]]
"""Module -> what it was called with, (rows, in); routed experts also have (rows, active) chosen and gates."""


class _Reached(Exception):
    pass


def read(run: Callable[[], Any], modules: Iterable[nn.Module], *, leave: bool) -> Reading:
    """Call `run` and give back what each of `modules` read, padding included.

    leave: stop as soon as all of them were called; the rest of the block need not run.
    """
    found: Reading = {}
    waiting = set(modules)

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args or (kwargs["hidden_states"],)
        found[module] = tuple(a.flatten(0, -2) for a in given if isinstance(a, Tensor))  # MLA gives four dimensions
        waiting.discard(module)
        if leave and not waiting:
            raise _Reached

    hooks = [module.register_forward_pre_hook(on_call, with_kwargs=True) for module in waiting.copy()]
    try:
        run()
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def without_padding(seen: Reading, keep: Tensor) -> Reading:
    """The rows where keep, (batch * tokens,) bool, is True."""
    if keep.all():
        return seen
    return {module: tuple(rows[keep] for rows in args) for module, args in seen.items()}


@dataclass
class StageStatistics:
    """Statistics of the groups of one stage: for plain matrices sums that grow as the batches pass; for routed experts
    what their layer read, from which the sums of one expert are made when they are asked for.

    Rows of a routed expert are weighted by their router weight g: input_norm^2 = sum g^2 x^2, hessian = sum g^2 x x^T.
    Those of an expert that saw few tokens are drawn toward its layer's (`shrunk`).

    Args:
        needs: `Statistics` fields. dense_gate_up: experts' module -> gate_up of all experts before it was compressed.
    """

    groups: list[InputGroup]
    needs: frozenset[str]
    dense_gate_up: dict[nn.Module, Tensor] = field(default_factory=dict)
    _sums: dict[nn.Module, Sums] = field(default_factory=dict)
    _routed: dict[nn.Module, list[_Routed]] = field(default_factory=dict)
    _pooled: dict[str, Statistics] = field(default_factory=dict)

    def add(self, seen: Reading, fold: Tensor, dense: Reading, residuals: dict[InputGroup, nn.Module]) -> None:
        """One batch. fold: (rows,), the half of the text each row belongs to. dense: what the dense model read, empty
        when no solver asks. residuals: group -> the module that reads the stream its output is added to."""
        for group in self.groups:
            if not torch.isfinite(seen[group.first.module][0].sum(dtype=torch.float32)):
                raise CompressError(
                    "activations are not finite",
                    where=f"what {group.first.name} reads",
                    next_step="check the calibration data, the checkpoint and the model's dtype",
                )
        for module in {group.first.module: None for group in self.groups if group.first.expert is not None}:
            given = dense[module][0] if dense else None
            self._routed.setdefault(module, []).append(_Routed(seen[module], fold, given))
        for group in self.groups:
            if group.first.expert is not None:
                continue
            module, stream = group.first.module, residuals.get(group)
            shift = dense[stream][0].float() - seen[stream][0].float() if dense and stream is not None else None
            sums = self._sums.setdefault(module, Sums(self.needs))
            sums.add(seen[module][0], fold, dense[module][0] if dense else None, shift)

    def of(self, group: InputGroup) -> Statistics:
        """What the group's input came to."""
        if group.first.expert is None:
            return self._sums[group.first.module].statistics()
        own, prior = self._of_expert(group), self._prior(group)
        if own.tokens >= 16 * prior:
            return own
        layer = group.first.parameter
        if layer not in self._pooled:
            everybody = pooled(self._of_expert(g) for g in self.groups if g.first.parameter == layer)
            self._pooled[layer] = featureless(everybody) if group.gate_up else everybody
        return shrunk(own, self._pooled[layer], prior)

    def _prior(self, group: InputGroup) -> float:
        """Tokens' worth of pooled statistics beside an expert's own: a Hessian of rank below its width says little."""
        return group.first.shape[1] / 4 if "hessian" in self.needs else STARVED / 16

    def _of_expert(self, group: InputGroup) -> Statistics:
        module, sums = group.first.module, Sums(self.needs, routed=True)
        live = module.get_parameter(group.gate_up)[group.first.expert] if group.gate_up else None
        before = self.dense_gate_up[module][group.first.expert] if group.gate_up and self.dense_gate_up else None
        for batch in self._routed[module]:
            rows, token = batch.rows(group, batch.args[0], live)
            dense = None if batch.dense is None else batch.rows(group, batch.dense, before)[0]
            sums.add(rows, batch.fold[token], dense)
        return sums.statistics()

    @property
    def starved(self) -> dict[str, int]:
        """Experts that fewer than `STARVED` tokens reached."""
        counts: dict[str, int] = {}
        for group in self.groups:
            if group.first.expert is not None:
                chosen = (batch.args[1] == group.first.expert for batch in self._routed[group.first.module])
                counts[group.first.name] = sum(int(c.sum()) for c in chosen)
        return {name: count for name, count in counts.items() if count < STARVED}


@dataclass
class _Routed:
    """What a layer of routed experts read in one batch: hidden (rows, hidden), chosen and gates (rows, active)."""

    args: tuple[Tensor, ...]
    fold: Tensor
    dense: Tensor | None

    def rows(self, group: InputGroup, hidden: Tensor, gate_up: Tensor | None) -> tuple[Tensor, Tensor]:
        """What one expert's matrix reads, times its gates, and which rows of the layer they are. gate_up: (2 * width,
        hidden), what its channels are made with; None for the matrix that reads the layer's input itself."""
        token, place = (self.args[1] == group.first.expert).nonzero(as_tuple=True)  # type: ignore[attr-defined]
        found = hidden[token]
        if gate_up is not None:
            first, second = F.linear(found.to(gate_up.dtype), gate_up).chunk(2, dim=-1)
            found = group.first.module.act_fn(first) * second  # type: ignore[operator]
        return found * self.args[2][token, place].to(found.dtype)[:, None], token
