"""How the model runs its blocks on the calibration batches: what it hands to the first, and each block on its own."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.oneshot.order import InputGroup
from hf_compress.precision import calibrating
from hf_compress.weights import blocks_of


class Block:
    """A block that can go on from its middle: ``x + attention(norm(x))``, once known, is not computed again."""

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        self.index, self.module, self._family = index, blocks_of(model)[index], family_of(model.config)
        self._precision = partial(calibrating, model)

    def __call__(self, call: Call) -> Tensor:
        if call.middle is None:
            return self.whole(call, call.hidden)
        ffn, norm = (self.module.get_submodule(name) for name in (self._family.ffn, self._family.residuals[1]))
        with self._precision(call.middle.device.type):
            return self._finite(call.middle + ffn(norm(call.middle)))

    def whole(self, call: Call, hidden: Tensor) -> Tensor:
        with self._precision(hidden.device.type):
            out = self.module(hidden, *call.args, **call.kwargs)
        return self._finite(out[0] if isinstance(out, tuple) else out)

    def after_attention(self, call: Call, projection: nn.Module, rows: Tensor) -> Tensor:
        """The stream in the middle of the block, from what the last projection of its attention reads."""
        with self._precision(rows.device.type):
            added: Tensor = projection(rows)
            return call.hidden + added.view_as(call.hidden)

    def ends_attention(self, stage: list[InputGroup]) -> bool:
        """Whether the stage is the one matrix whose output attention adds to the stream of such a block."""
        return bool(self._family.ffn) and len(stage) == 1 and stage[0].residual == self._family.residuals[0]

    def _finite(self, hidden: Tensor) -> Tensor:
        if not torch.isfinite(hidden).all():
            raise CompressError(
                "activations are not finite",
                where=f"block {self.index}",
                next_step="check the calibration data and the model's dtype",
            )
        return hidden


@dataclass
class Call:
    """How the model calls its blocks for one batch, and its activations, (batch, tokens, hidden) each.

    hidden: what goes into the next block. middle: what goes into its FFN's half, once its attention is compressed.
    dense: as hidden, of the dense model. mask: (batch, tokens) bool, not padding. fold: (rows that are not padding,)
    0 or 1, the half of the text they belong to. mark: what its tokens come to, for an order that only they decide.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor
    middle: Tensor | None = None
    dense: Tensor | None = None
    fold: Tensor = field(init=False)
    mark: int = field(init=False)

    @property
    def keep(self) -> Tensor:
        return self.mask.flatten()


def halve(calls: list[Call], batches: list[Batch]) -> None:
    """Mark each call, and put every other sequence in the other fold, in an order that their tokens decide, not the
    batches."""
    marks = [zlib.crc32(ids[mask.bool()].numpy().tobytes()) for b in batches for ids, mask in _sequences(b)]
    place = {sequence: rank for rank, sequence in enumerate(sorted(range(len(marks)), key=marks.__getitem__))}
    number = 0
    for call in calls:
        half = [place[number + row] % 2 for row in range(len(call.mask))]
        call.mark = marks[number]
        number += len(call.mask)
        fold = torch.tensor(half, device=call.mask.device)[:, None].expand_as(call.mask)
        call.fold = fold.flatten()[call.keep]


def _sequences(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True)


class _Stop(Exception):
    pass


def first_call(model: PreTrainedModel, block: nn.Module, batch: Batch) -> Call:
    """What the model passes to its first block for this batch."""
    seen: list[Call] = []
    mask = batch["attention_mask"].bool().to(model.device)

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = copy.copy(kwargs)
        for name, off in (("past_key_values", None), ("use_cache", False)):
            if name in kwargs:  # a block runs many times: it must not add to a cache, nor read what it added
                kwargs[name] = off
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append(Call(hidden, args[1:], kwargs, mask))
        raise _Stop

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
    except _Stop:
        pass
    finally:
        hook.remove()
    return seen[0]
