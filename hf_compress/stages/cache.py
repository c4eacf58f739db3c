"""Keep keys and values in fewer bits while the model generates. The weights stay; plain from_pretrained brings the
setting along in generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache

from hf_compress.calibration import Batch, writes_nothing
from hf_compress.errors import CompressError, did_you_mean, require
from hf_compress.stages.base import Done, Stage, Work

KINDS = ("int8", "fp8")  # not int4: hqq packs two groups into one byte, and an odd number of groups fails
GROUPS = (64, 32, 16, 8)  # values of one head that share a scale: the largest that divides it
READ = 8  # rows of text that say what it costs


@dataclass
class Cache(Stage):
    """``cache: {kind: int8}``"""

    kind: str = field(
        default="int8",
        metadata={
            "help": "int8, a scale for each 64 values (whoever generates needs the package hqq); or fp8, one scale "
            "for all, which needs no package and loses much more"
        },
    )
    recent: int = field(
        default=128,
        metadata={"help": "int8: tokens that stay as they are, until so many have come; then all of them go"},
    )

    def check(self, work_kinds: list[str], *, where: str) -> None:
        if self.kind not in KINDS:
            raise CompressError(
                f"unknown kind {self.kind!r}", where=f"{where}.kind", next_step=did_you_mean(self.kind, KINDS)
            )
        if type(self.recent) is not int or self.recent < 1:
            raise CompressError(f"{self.recent!r} is no number of tokens", where=f"{where}.recent")
        if "quantize" in work_kinds:
            raise CompressError(
                "packed weights would be written again for a setting",
                where=where,
                next_step="put cache before quantize: the setting stays with the model",
            )
        if self.kind == "int8":
            require("hqq", extra="cache", what="a cache in int8")

    def calibrates(self, model: PreTrainedModel) -> bool:
        return True

    def refusal(self, model: PreTrainedModel) -> str:
        """Why transformers does not keep the cache of `model` (on the meta device too) like that; "" where it does."""
        if why := writes_nothing(model):
            return why
        try:
            QuantizedCache("fp8", model.config)
        except ValueError as error:
            return str(error)
        widths = head_widths(model.config)
        if self.kind == "int8" and not _group(widths):
            return f"heads of {' and '.join(map(str, widths))} values are no whole groups of 8"
        return ""

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """`cache_config` of a generation_config."""
        if self.kind == "fp8":
            return {"backend": "fp8"}
        shape = {"axis_key": 1, "axis_value": 1, "q_group_size": _group(head_widths(config))}
        return {"backend": "hqq", "nbits": 8, **shape, "residual_length": self.recent}

    def run(self, work: Work) -> Done:
        model = work.model
        if why := self.refusal(model):
            raise CompressError(why, where="cache", next_step="leave the stage out")
        settings = self.settings(model.config)
        facts = cost(model, work.calibration(model.config.vocab_size, READ), settings)
        model.generation_config.cache_implementation = "quantized"
        model.generation_config.cache_config = settings
        note = (
            f"generate() keeps keys and values in {self.kind}, {facts['bytes_per_token']:.0f} bytes a token, not "
            f"{facts['dense_bytes_per_token']:.0f}; at {facts['positions']} positions of training text the KL of its "
            f"answers to those without a cache is {facts['kl']:.2g}"
        )
        needs = "; it needs `pip install hqq`" if self.kind == "int8" else ""
        return Done(model, {"kind": self.kind, **facts, "notes": [note + needs]}, scales=work.scales)


def head_widths(config: PreTrainedConfig) -> tuple[int, ...]:
    """Values of one head's key and value of a token."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "qk_rope_head_dim", None):
        return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    return (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,)


def _group(widths: Sequence[int]) -> int:
    return next((group for group in GROUPS if not any(width % group for width in widths)), 0)


@torch.no_grad()
def cost(model: PreTrainedModel, batches: list[Batch], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache with `settings` takes and loses, where the first half of each row is read at once, the rest token
    by token.

    Returns:
        bytes_per_token, dense_bytes_per_token: of all layers, after the first half. kl: KL(without a cache || with
        it) in nats, mean over the `positions` of the second halves.

    Raises:
        CompressError: rows of fewer than four tokens.
    """
    rows = [ids[real] for b in batches for ids, real in zip(b["input_ids"], b["attention_mask"].bool(), strict=True)]
    length = min(map(len, rows))
    if length < 4:
        raise CompressError(
            f"a row of {length} tokens has nothing to read from a cache",
            where="data",
            next_step="packing: true, or longer rows",
        )
    ids, half = torch.stack([row[:length] for row in rows]).to(model.device), length // 2
    training = model.training
    model.eval()
    try:
        wanted = model(ids, use_cache=False).logits[:, half:]
        dense = DynamicCache(config=model.config)
        model(ids[:, :half], past_key_values=dense)
        kept = QuantizedCache(config=model.config, **settings)
        model(ids[:, :half], past_key_values=kept)
        sizes = [_bytes([vars(layer) for layer in cache.layers]) / ids[:, :half].numel() for cache in (kept, dense)]
        total = 0.0
        for at in range(half, length):
            answer = model(ids[:, at : at + 1], past_key_values=kept).logits[:, 0]
            target = wanted[:, at - half].float().log_softmax(-1)
            total += float(F.kl_div(answer.float().log_softmax(-1), target, reduction="sum", log_target=True))
    finally:
        model.train(training)
    count = ids[:, half:].numel()
    return {"bytes_per_token": sizes[0], "dense_bytes_per_token": sizes[1], "kl": total / count, "positions": count}


def _bytes(held: Any) -> int:
    """Of all tensors in nested lists, tuples and dicts."""
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    inside = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return sum(_bytes(each) for each in inside)
