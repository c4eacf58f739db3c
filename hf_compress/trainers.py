"""A trainer for each technique: its options beside the Trainer's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from hf_compress.techniques.base import Technique
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.trainer import CompressionTrainer


class DistillationTrainer(CompressionTrainer):
    """``DistillationTrainer(student, "org/teacher", temperature=2.0, args=..., train_dataset=...)``; takes
    every field of `Distillation`."""

    def __init__(
        self,
        model: nn.Module,
        teacher_model: Any = None,
        *,
        techniques: Sequence[Technique] = (),
        **others: Any,
    ) -> None:
        own = {field.name: others.pop(field.name) for field in fields(Distillation) if field.name in others}
        super().__init__(model, techniques=[Distillation(teacher_model, **own), *techniques], **others)


class PruningTrainer(CompressionTrainer):
    """``PruningTrainer(model, sparsity=0.5, pattern="2:4", args=..., train_dataset=...)``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        pattern: str = "unstructured",
        schedule: str = "cubic",
        techniques: Sequence[Technique] = (),
        **others: Any,
    ) -> None:
        super().__init__(model, techniques=[Pruning(sparsity, pattern, schedule=schedule), *techniques], **others)


class QATTrainer(CompressionTrainer):
    """``QATTrainer(model, bits=4, group_size=32, args=..., train_dataset=...)``; takes every field of `QAT`."""

    def __init__(self, model: nn.Module, *, techniques: Sequence[Technique] = (), **others: Any) -> None:
        own = {field.name: others.pop(field.name) for field in fields(QAT) if field.name in others}
        super().__init__(model, techniques=[QAT(**own), *techniques], **others)
