"""Rounding of what enters layers, while they train: a range for each token, or one for all, learned by watching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import CompressError
from hf_compress.grids import straight_through
from hf_compress.observers import Observer, Seen, affine


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """(..., width) -> the same, each token as integers -2^(b-1) .. 2^(b-1) - 1 times its max |x| / ((2^b - 1) / 2);
    the gradient is 1.

    As compressed-tensors computes it (the container of W8A8), in the dtype of x.
    """
    half = 1 << (bits - 1)
    values = x.detach()
    scale = values.abs().amax(-1, keepdim=True) / (half - 0.5)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return straight_through(x, (values / scale).clamp(-half, half - 1).round() * scale)


def round_within(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """x -> scale (level - zero) of `affine`; gradient 1 inside the range, 0 outside."""
    scale, zero = affine(low, high, bits)
    inside = x.clamp(-zero * scale, ((1 << bits) - 1 - zero) * scale)
    return straight_through(inside, (inside.detach() / scale).round() * scale)


class Inputs:
    """Hooks on layers, name -> module, that round their input while `on`.

    observer: None for a range of each token; else one range for all, found by it after 1, 2, 4, ... steps from what
    training batches held until then. In a step every micro-batch is rounded with the range from before the step (the
    first: not at all), and what it holds is added after the step over all ranks, so neither accumulation, ranks nor
    recomputation (activation checkpointing) change what is trained.
    """

    def __init__(self, layers: Mapping[str, nn.Module], bits: int, observer: Observer | None) -> None:
        self.bits, self.observer, self.on, self.frozen = bits, observer, False, False
        self._seen = {name: Seen() for name in layers} if observer is not None else {}
        self._new: dict[str, Seen] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self._steps = 0
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, module in layers.items()
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.on:
                return None
            if not args or kwargs:
                raise CompressError(
                    "its input is not the one positional argument that is known how to round",
                    where=name,
                    next_step="leave activations out, or skip this weight",
                )
            return (self._rounded(name, args[0], watch=module.training), *args[1:]), kwargs

        return hook

    def _rounded(self, name: str, x: Tensor, *, watch: bool) -> Tensor:
        if self.observer is None:
            return round_tokens(x, self.bits)
        if watch and not self.frozen:
            if not torch.isfinite(x).all():
                raise CompressError(
                    "activations are not finite, and have no range",
                    where=f"qat.ranges: {name}",
                    next_step="lower the learning rate, or check the data and the model's dtype",
                )
            self._new.setdefault(name, Seen()).add(x)
        return round_within(x, *self.ranges[name], self.bits) if name in self.ranges else x

    def after_step(self) -> None:
        """Once an optimizer step is done on every rank."""
        if self.observer is None or self.frozen or not self.on:
            return
        self._steps += 1
        for name, seen in self._seen.items():
            new = _over_ranks(self._new.pop(name, Seen()))
            seen.merge(new)
        if self._steps & (self._steps - 1) == 0:
            self._find()

    def freeze(self) -> None:
        if self.observer is not None and not self.frozen:
            self._find()
        self.frozen = True

    def _find(self) -> None:
        assert self.observer is not None
        self.ranges = {name: self.observer(seen, self.bits) for name, seen in self._seen.items() if seen.counts.any()}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"steps": torch.tensor([self._steps, int(self.frozen)])}
        for name, seen in self._seen.items():
            found[f"counts {name}"] = seen.counts
            found[f"ends {name}"] = torch.tensor(
                [seen.exponent, seen.low, seen.high, *self.ranges.get(name, ())], dtype=torch.float64
            )
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`.

        Raises:
            CompressError: other layers, or other ranges, than were watched.
        """
        names = {key.removeprefix("counts ") for key in state if key.startswith("counts ")}
        if "steps" not in state or names != set(self._seen):
            raise CompressError(
                "the checkpoint watched other activations",
                where="qat.activations",
                next_step="resume with the activations and ranges that were interrupted",
            )
        self._steps, self.frozen = int(state["steps"][0]), bool(state["steps"][1])
        self.ranges, self._new = {}, {}
        for name in names:
            exponent, low, high, *found = state[f"ends {name}"].tolist()
            self._seen[name] = Seen(state[f"counts {name}"].clone(), int(exponent), low, high)
            if found:
                self.ranges[name] = (found[0], found[1])


def _over_ranks(seen: Seen) -> Seen:
    """What all ranks saw."""
    if not torch.distributed.is_initialized():
        return seen
    on_gpu = torch.distributed.get_backend() == "nccl"  # which sums nothing else
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    ends = torch.tensor([-seen.low, seen.high], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    seen.low, seen.high = -float(ends[0]), float(ends[1])
    seen.grow(max(-seen.low, seen.high))
    counts = seen.counts.to(device)
    torch.distributed.all_reduce(counts)
    seen.counts = counts.cpu()
    return seen
