"""Keep keys and values in 8 bits while the model generates. The weights stay; plain from_pretrained brings the setting
along in generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache

from hf_compress.calibration import rows_of, writes_nothing
from hf_compress.errors import CompressError, require
from hf_compress.stages.base import Done, Stage, Work, refuse_late
from hf_compress.writing import bytes_held

GROUPS = (64, 32, 16, 8)  # values of one head that share a scale: the largest that divides it
DRAWN, READ, LONGEST = 64, 4, 512  # of so many rows of text the longest are read, up to so many tokens each


@dataclass
class Cache(Stage):
    """``cache: {recent: 128}``

    By transformers' QuantizedCache on hqq. Its other 8-bit backend, fp8, is left out: it keeps one scale for all that
    it finds for the first tokens, and what comes later is cut to their range (SmolLM2-135M that begins with one token:
    a KL of .24 to its answers without a cache, where int8 has 1e-4). Fewer bits are, too: hqq packs two groups into a
    byte, and reading them back fails where their number is odd.
    """

    recent: int = field(
        default=128,
        metadata={
            "help": "tokens after the prompt that stay as they are until so many have come; then all are rounded"
        },
    )

    def check(self, work_kinds: list[str], *, where: str) -> None:
        if "cache" in work_kinds:
            raise CompressError("there is a cache stage already", where=where, next_step="keep one of them")
        refuse_late(work_kinds, where=where)
        if type(self.recent) is not int or self.recent < 1:
            raise CompressError(
                f"{self.recent!r} is no number of tokens", where=f"{where}.recent", next_step="1 or more"
            )
        if "quantize" in work_kinds:
            raise CompressError(
                "the setting goes into the folder that quantize writes",
                where=where,
                next_step="put cache before quantize",
            )
        require("hqq", extra="cache", what="a cache in 8 bits")

    def calibrates(self, model: PreTrainedModel) -> bool:
        return True

    def refusal(self, model: PreTrainedModel) -> str:
        """Why transformers keeps no such cache of `model` (on the meta device too); "" where it does."""
        if writes_nothing(model):
            return f"only causal language models keep keys and values, and this is a {type(model).__name__}"
        try:
            QuantizedCache("hqq", model.config)
        except ValueError as error:
            return str(error)
        widths = head_widths(model.config)
        return "" if _group(widths) else f"heads of {' and '.join(map(str, widths))} values are no whole groups of 8"

    @property
    def foreseen(self) -> str:
        """For a plan."""
        return (
            f"generate() keeps the prompt in int8, and what comes later {self.recent} tokens at a time: less memory, "
            "no less time; whoever generates needs `pip install hqq`"
        )

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """`cache_config` of a generation_config."""
        shape = {"axis_key": 1, "axis_value": 1, "q_group_size": _group(head_widths(config))}
        return {"backend": "hqq", "nbits": 8, **shape, "residual_length": self.recent}

    def run(self, work: Work) -> Done:
        model = work.model
        if why := self.refusal(model):
            raise CompressError(why, where="cache", next_step="leave the stage out")
        settings = self.settings(model.config)
        rows = rows_of(work.calibration(model.config.get_text_config().vocab_size, DRAWN))
        facts = cost(model, sorted(rows, key=len)[-READ:], settings)
        model.config.use_cache = True  # a source that was trained with checkpointing says no, and would keep nothing
        model.generation_config.use_cache = True
        model.generation_config.cache_implementation = "quantized"
        model.generation_config.cache_config = settings
        kind = str(model.dtype).removeprefix("torch.")
        notes = [
            f"generate() keeps keys and values of the prompt in int8, and later ones once {self.recent} have come: "
            f"{facts['bytes_per_token']:,.0f} bytes a token where {kind} takes {facts['dense_bytes_per_token']:,.0f}. "
            f"At {facts['positions']} positions of training text the KL of its answers to those computed without a "
            f"cache is {facts['kl']:.2g}.",
            "It saves memory and no time, and needs the package hqq; generate(cache_implementation='dynamic') does "
            "without. What is measured against the dense model is computed without a cache.",
        ]
        return Done(model, {**facts, "dtype": kind, "notes": notes}, scales=work.scales)


def head_widths(config: PreTrainedConfig) -> tuple[int, ...]:
    """Values of a head that may be cached for a token: keys and values, of MLA also its latent and its rotary part,
    which is what transformers caches of it now."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        rotary = text.qk_rope_head_dim
        return text.qk_nope_head_dim + rotary, text.v_head_dim, text.kv_lora_rank, rotary
    return (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,)


def _group(widths: tuple[int, ...]) -> int:
    return next((group for group in GROUPS if not any(width % group for width in widths)), 0)


@torch.no_grad()
def cost(model: PreTrainedModel, rows: list[Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache with `settings` takes and loses on `rows`, (tokens,) int64 each: the first half of a row is read at
    once, the rest token by token.

    Returns:
        bytes_per_token, dense_bytes_per_token: of all layers, after the first half, mean over tokens. kl: KL(without a
        cache || with it) in nats, mean over the `positions` of the second halves.

    Raises:
        CompressError: no row of four tokens; answers that are not finite.
    """
    read = [row[:LONGEST].to(model.device)[None] for row in rows if len(row) >= 4]
    if not read:
        raise CompressError(
            "no row of text has four tokens, and shorter ones have nothing to read from a cache",
            where="cache",
            next_step="packing: true, or longer rows",
        )
    training, loss, positions, first, sizes = model.training, 0.0, 0, 0, [0, 0]
    model.eval()
    try:
        for ids in read:
            half = ids.shape[1] // 2
            wanted = model(ids, use_cache=False).logits[0, half:].float().log_softmax(-1)
            kept, dense = QuantizedCache(config=model.config, **settings), DynamicCache(config=model.config)
            for i, cache in enumerate((kept, dense)):
                model(ids[:, :half], past_key_values=cache, use_cache=True)
                sizes[i] += bytes_held(cache)
            for token, target in zip(ids[0, half:], wanted, strict=True):
                answer = model(token[None, None], past_key_values=kept, use_cache=True).logits[0, 0].float()
                loss += float(F.kl_div(answer.log_softmax(-1), target, reduction="sum", log_target=True))
            positions, first = positions + len(wanted), first + half
    finally:
        model.train(training)
    if not loss < float("inf"):  # NaN too
        raise CompressError(
            "answers read from the cache are not finite", where="cache", next_step="leave the stage out"
        )
    each = [size / first for size in sizes]
    return {
        "bytes_per_token": each[0],
        "dense_bytes_per_token": each[1],
        "kl": loss / positions,
        "positions": positions,
    }
