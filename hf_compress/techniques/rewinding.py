"""Going back to the weights of an earlier step after every cut, under the new masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """Trainable parameters of a model and their optimizer state at one moment; the learning rate is not part of it.

    Frankle et al. 2020 (https://arxiv.org/abs/1912.05671): survivors go back to an early step, not to the start.
    Renda et al. 2020 (https://arxiv.org/abs/2003.02389) replay the learning rate too; with a Trainer that is
    `lr_scheduler_type: cosine_with_restarts` with as many cycles.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._values: dict[str, Tensor] = {}
        self._moments: dict[str, dict[str, Any]] = {}

    def __bool__(self) -> bool:
        """False until `take`."""
        return bool(self._values)

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._moments = {name: _copied(optimizer.state.get(p, {})) for name, p in self._parameters.items()}

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._values[name])
            live = optimizer.state.get(parameter, {})
            optimizer.state[parameter] = {
                key: _beside(moment, live.get(key), parameter) for key, moment in _copied(self._moments[name]).items()
            }

    def state(self) -> dict[str, Tensor]:
        """Values and moments by name; plain numbers as 0-dimensional int64 or float64, which no optimizer keeps as
        a tensor."""
        found = {f"values {name}": value for name, value in self._values.items()}
        for name, moments in self._moments.items():
            for key, moment in moments.items():
                found[f"moment {key} {name}"] = moment if isinstance(moment, Tensor) else _number(moment)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        self._values, self._moments = {}, {name: {} for name in self._parameters}
        for stored, value in state.items():
            kind, _, rest = stored.partition(" ")
            if kind == "values":
                self._values[rest] = value.to(self._parameters[rest].device)
            else:
                key, _, name = rest.partition(" ")
                number = value.dim() == 0 and value.dtype in (torch.int64, torch.float64)
                self._moments[name][key] = value.item() if number else value.clone()


def _copied(moments: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: moment for key, moment in moments.items() if moment is not None}
    return {key: moment.clone() if isinstance(moment, Tensor) else moment for key, moment in given.items()}


def _beside(moment: Any, live: Any, parameter: Tensor) -> Any:
    """On the device of the moment it stands in for; a resumed run has none yet: full moments go to the parameter's."""
    if not isinstance(moment, Tensor):
        return moment
    if isinstance(live, Tensor):
        return moment.to(live.device)
    return moment.to(parameter.device) if moment.dim() else moment


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
