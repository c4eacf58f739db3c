"""Text, prompts and chats -> token ids and labels, and batches of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_compress.errors import CompressError


@dataclass(frozen=True)
class Encoder:
    """Batch of columns -> input_ids, attention_mask, labels. Causal labels are the tokens themselves, or -100 where
    only completions are learned. `text`, `label`, `prompt` and `messages` name columns, as in `Data`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    text: str
    label: str | None = None
    prompt: str | None = None
    messages: str | None = None
    packing: bool = False
    completion_only: bool = False

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        for column in (self.messages, self.prompt, self.text if self.messages is None else None):
            if column is not None and (missing := sum(value is None for value in batch[column])):
                raise CompressError(
                    f"{missing} of {len(batch[column])} rows hold nothing in the column {column!r}",
                    where="data",
                    next_step="take them out, or name another column",
                )
        if self.messages is not None:
            texts, spans = zip(*(self._chat(messages) for messages in batch[self.messages]), strict=True)
        elif self.prompt is not None:
            pairs = list(zip(batch[self.prompt], batch[self.text], strict=True))
            texts = tuple(f"{prompt}{text}{self.tokenizer.eos_token or ''}" for prompt, text in pairs)
            spans = tuple([(len(prompt), len(whole))] for (prompt, _), whole in zip(pairs, texts, strict=True))
        else:
            texts = tuple(batch[self.text])
            spans = tuple([(0, len(text))] for text in texts)
        encoded = dict(
            self.tokenizer(
                list(texts),
                truncation=not self.packing,
                max_length=None if self.packing else self.max_length,
                add_special_tokens=self.messages is None,  # the template writes its own
                return_offsets_mapping=self.completion_only,
            )
        )
        encoded.pop("token_type_ids", None)
        offsets = encoded.pop("offset_mapping", None)
        if self.label is not None:
            return encoded | {"labels": batch[self.label]}
        labels = encoded["input_ids"]
        if offsets is not None:
            labels = [
                [
                    token if any(a <= start < b for a, b in span) and start < end else -100
                    for token, (start, end) in row
                ]
                for row, span in zip(
                    (zip(ids, where, strict=True) for ids, where in zip(labels, offsets, strict=True)),
                    spans,
                    strict=True,
                )
            ]
        return self._pack(encoded["input_ids"], labels) if self.packing else encoded | {"labels": labels}

    def _chat(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat, and where in it the assistant's turns are."""

        def render(count: int, prompt: bool) -> str:
            shown = self.tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
            assert isinstance(shown, str)
            return shown

        text, spans = render(len(messages), False), []
        if self.completion_only:
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    before, after = render(index, True), render(index + 1, False)
                    if not (text.startswith(after) and after.startswith(before)):
                        raise CompressError(
                            "the chat template rewrites earlier turns, so the assistant's part cannot be told apart",
                            where="data.completion_only",
                            next_step="learn whole chats (completion_only: false), or use a prompt_column",
                        )
                    spans.append((len(before), len(after)))
        return text, spans

    def _pack(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        """Rows joined by the end-of-text token and cut into rows of max_length; the rest is dropped."""
        size, end = self.max_length, self.tokenizer.eos_token_id
        starts = range(0, sum(len(row) + 1 for row in ids) - size + 1, size)
        joined = {
            "input_ids": [t for row in ids for t in [*row, end]],
            "labels": [t for row in labels for t in [*row, end]],
        }
        cut = {name: [tokens[i : i + size] for i in starts] for name, tokens in joined.items()}
        return cut | {"attention_mask": [[1] * size for _ in starts]}


class CausalCollator:
    """Pads rows to the longest, with labels -100 at padding only, so a real end-of-text token is still learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = dict(self.pad([{"input_ids": r["input_ids"], "attention_mask": r["attention_mask"]} for r in rows]))
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        # beside the tokens, on whichever side the tokenizer pads
        batch["labels"][batch["attention_mask"] == 1] = torch.cat([torch.as_tensor(r["labels"]) for r in rows])
        return batch
