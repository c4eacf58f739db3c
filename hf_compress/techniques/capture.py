"""Keep what passes through the blocks of a model: block outputs, queries, keys and values, attention maps, routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.weights import base_of, blocks_of

Place = tuple[str, int]
"""A kind of loss (hidden, flow, qkv, attention, router) and a block's index."""


class Capture:
    """Keeps what passes through chosen places of a model while `on()`; hooks stay until `remove`, and so does eager
    attention, the only one that has maps to give, where attention is among the places."""

    def __init__(self, model: nn.Module, places: set[Place]) -> None:
        self.found: dict[Place, Any] = {}
        self._on, self._handles = False, list[Any]()
        base = base_of(model)
        self._config, family, blocks = base.config, family_of(base.config), blocks_of(model)
        self._model, self._attended_by = base, base.config._attn_implementation
        self._eager = any(kind == "attention" for kind, _ in places)
        if self._eager:
            base.set_attn_implementation("eager")
        for place in sorted(places):
            kind, index = place
            if kind in ("hidden", "flow"):
                self._hook(blocks[index], place, partial(_entering_and_leaving, flow=kind == "flow"))
            elif kind == "attention":
                self._hook(blocks[index].get_submodule(family.qkv[0].rpartition(".")[0]), place, _attention_map)
            elif kind == "router":
                self._hook(_router(blocks[index], index, base), place, lambda inputs, output, before: output[0])
            else:
                names = [n if has(blocks[index], n) else n.replace("q_b_proj", "q_proj") for n in family.qkv]
                for name in names:
                    self._hook(blocks[index].get_submodule(name), place, _appended)

    def _hook(self, module: nn.Module, place: Place, read: Any) -> None:
        def keep(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._on:
                self.found[place] = read(inputs or tuple(kwargs.values()), output, self.found.get(place))

        self._handles.append(module.register_forward_hook(keep, with_kwargs=True))

    @contextmanager
    def on(self) -> Iterator[None]:
        """While the model's forward runs; a second run of checkpointed blocks in backward changes nothing."""
        self.found, self._on = {}, True
        try:
            yield
        finally:
            self._on = False

    def at(self, place: Place, shape: tuple[int, int]) -> Any:
        """What the loss of that kind reads; `shape`: (batch, positions)."""
        kind, found = place[0], self.found[place]
        if kind == "router":
            return found.reshape(*shape, -1)
        return _split_qkv(found, self._config, shape) if kind == "qkv" else found

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._eager:
            self._model.set_attn_implementation(self._attended_by)


def _entering_and_leaving(inputs: tuple[Any, ...], output: Any, _: Any, *, flow: bool) -> Any:
    leaving = output if isinstance(output, Tensor) else output[0]
    return (inputs[0], leaving) if flow else leaving


def _appended(_: tuple[Any, ...], output: Tensor, before: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return (*(before or ()), output)


def _attention_map(_: tuple[Any, ...], output: Any, before: Any) -> Tensor:
    if not isinstance(output, tuple) or output[1] is None:
        raise CompressError(
            "this model's attention gives no maps",
            where="distill.features",
            next_step="take `relations`, which need none",
        )
    maps: Tensor = output[1]
    if ((maps.detach().sum(-1, dtype=torch.float32) - 1).abs() > 0.02).any():
        raise CompressError(
            "attention maps that do not sum to 1: what dropout leaves of them is not where the student looks",
            where="distill.features",
            next_step="dropout: 0 in the train stage, load the student with attention_probs_dropout_prob (or what its "
            "config calls it) 0, or take `relations`",
        )
    return maps


def _router(block: nn.Module, index: int, model: nn.Module) -> nn.Module:
    experts = family_of(model.config).experts
    if experts is None or not has(block, experts.router[0]):
        raise CompressError(
            f"block {index} of {type(model).__name__} has no router",
            where="distill.features",
            next_step="router losses are for mixture-of-experts models; map MoE blocks to MoE blocks",
        )
    return block.get_submodule(experts.router[0])


def has(block: nn.Module, name: str) -> bool:
    """Whether a block holds a module of that name."""
    return any(found == name for found, _ in block.named_modules())


def _split_qkv(found: tuple[Tensor, ...], config: Any, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    if len(found) == 1:
        return found[0].chunk(3, dim=-1)
    if len(found) == 2:  # latent attention; the second was called with (batch, 1, positions, rank)
        queries, pairs = found
        heads = pairs.reshape(*shape, -1, config.qk_nope_head_dim + config.v_head_dim)
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return queries, keys.flatten(2), values.flatten(2)
    return found
