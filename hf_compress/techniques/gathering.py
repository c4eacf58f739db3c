"""What a training run sees of every weight it may prune: gradients, their squares, movement, norms of inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.criteria import Statistics, seed_of
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.weights import Weight, base_of

GRADIENTS = frozenset({"gradient", "fisher", "movement"})


class Gathered:
    """Sums over the steps since the last `reset` (movement: since the run began), fp32, of what `needs` names only.

    Gradients are those that the optimizer is given: of a whole accumulated batch, averaged over ranks, clipped.
    Inputs are those of every training forward on every rank, without padding; a routed expert's are weighted by its
    gate.
    """

    def __init__(self, model: nn.Module, weights: list[Weight], needs: Collection[str]) -> None:
        self.weights, self.needs, self.steps = weights, frozenset(needs), 0
        self._whole = {w.parameter: w for w in weights}
        self._sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in sorted(self.needs & GRADIENTS)}
        # weight name -> (in + 1,) fp64: the sum of g^2 x^2 of each input, then the number of tokens
        self._inputs: dict[str, Tensor] = {}
        self._of_this_step: dict[str, Tensor] = {}
        self._keep: Tensor | None = None
        self._family = family_of(base_of(model).config)
        self._hooks = self._watch(base_of(model)) if "input_norm" in self.needs else []

    def add_step(self) -> None:
        """Before an optimizer step, while gradients are live."""
        self.steps += 1
        for weight in self.weights if "input_norm" in self.needs else []:
            seen = self._of_this_step.pop(weight.name, None)
            if seen is None:  # an expert that no token reached
                seen = torch.zeros(weight.shape[1] + 1, dtype=torch.float64, device=weight.whole.device)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(seen)
            _add(self._inputs, weight.name, seen)
        for name, weight in self._whole.items() if self._sums else []:
            if weight.whole.grad is None:
                raise CompressError(
                    "the weight got no gradient, which its importance is made from",
                    where=name,
                    next_step="do not freeze it, or skip it, or use another criterion",
                )
            gradient = weight.whole.grad.float()
            for kind, sums in self._sums.items():
                if kind == "fisher":
                    _add(sums, name, gradient.square())
                elif kind == "movement":
                    _add(sums, name, -gradient * weight.whole.data.float())
                else:
                    _add(sums, name, gradient)

    def statistics(self, weight: Weight, seed: int) -> Statistics:
        """Of one weight: means over steps, summed movement, the norm of its inputs; an expert that no token reached
        gets its layer's."""
        found = Statistics(seed=seed_of(weight.name, seed))
        if "input_norm" in self.needs:
            sums = self._inputs[weight.name]
            if sums[-1] == 0 and weight.expert is not None:
                layer = [self._inputs[w.name] for w in self.weights if w.parameter == weight.parameter]
                sums = torch.stack(layer).sum(0)
            found.tokens, found.input_norm = int(sums[-1]), sums[:-1].sqrt().float()
        for kind, totals in self._sums.items():
            total = weight.of(totals[weight.parameter])
            setattr(found, kind, total if kind == "movement" else total / self.steps)
        return found

    def reset(self) -> None:
        """Begin again, but for movement."""
        self.steps = 0
        self._inputs.clear()
        for kind, sums in self._sums.items():
            if kind != "movement":
                sums.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state(self) -> dict[str, Tensor]:
        tables = self._sums | {"inputs": self._inputs}
        found = {f"{kind} {name}": total for kind, sums in tables.items() for name, total in sums.items()}
        return found | {"steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self.steps = int(state["steps"])
        device = {w.parameter: w.whole.device for w in self.weights} | {w.name: w.whole.device for w in self.weights}
        for kind, sums in (self._sums | {"inputs": self._inputs}).items():
            sums.clear()
            prefix = f"{kind} "
            for key, total in state.items():
                if key.startswith(prefix):
                    name = key.removeprefix(prefix)
                    sums[name] = total.to(device[name])

    def _watch(self, model: nn.Module) -> list[Any]:
        by_module: dict[nn.Module, list[Weight]] = {}
        for weight in self.weights:
            by_module.setdefault(weight.module, []).append(weight)
        hooks: list[Any] = [model.register_forward_pre_hook(self._on_model, with_kwargs=True)]
        for module, group in by_module.items():
            hook = self._on_experts(group) if group[0].expert is not None else self._on_linear(group)
            hooks.append(module.register_forward_pre_hook(hook))
        return hooks

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._keep = None if mask is None else mask.flatten().bool()  # (batch * positions,)

    def _on_linear(self, group: list[Weight]) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module.training:
                rows = args[0].flatten(0, -2)
                for weight in group:
                    self._see(weight, rows if self._keep is None else rows[self._keep])

        return hook

    def _on_experts(self, group: list[Weight]) -> Any:
        assert self._family.experts is not None
        up = self._family.experts.gate_up
        by_expert: dict[int, list[Weight]] = {}
        for weight in group:
            assert weight.expert is not None
            by_expert.setdefault(weight.expert, []).append(weight)

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            if not module.training:
                return
            hidden, chosen, gates = args  # (tokens, hidden), (tokens, active), (tokens, active)
            for expert, weights in by_expert.items():
                picked = chosen == expert
                token, place = torch.where(picked if self._keep is None else picked & self._keep[:, None])
                rows, gate = hidden[token], gates[token, place][:, None]
                for weight in weights:
                    read = rows
                    if weight.attribute != up:
                        first, second = F.linear(rows, getattr(module, up)[expert].to(rows.dtype)).chunk(2, -1)
                        read = module.act_fn(first) * second  # type: ignore[operator]
                    self._see(weight, read * gate)

        return hook

    def _see(self, weight: Weight, rows: Tensor) -> None:
        square = rows.double().square().sum(0)
        _add(self._of_this_step, weight.name, torch.cat([square, square.new_tensor([len(rows)])]))


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    if name in sums:
        sums[name] += part
    else:
        sums[name] = part.clone()
