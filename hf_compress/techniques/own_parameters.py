"""Parameters that techniques bring along (projections): outside the model, and so unknown to the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.techniques.base import Technique


class OwnParameters(TrainerCallback):
    """Average their gradients over ranks, clip them as a group, zero them."""

    def __init__(self, techniques: Sequence[Technique]) -> None:
        self.techniques = techniques

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        own = [p for technique in self.techniques for p in technique.parameters() if p.grad is not None]
        if own and torch.distributed.is_initialized():
            for parameter in own:
                torch.distributed.all_reduce(parameter.grad)
                assert parameter.grad is not None
                parameter.grad /= torch.distributed.get_world_size()
        if own and args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(own, args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for technique in self.techniques:
            for parameter in technique.parameters():
                parameter.grad = None  # the Trainer zeroes the model's only
