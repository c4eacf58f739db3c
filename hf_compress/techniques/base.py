"""The life of a technique inside one training run. `CompressionTrainer` calls these methods; nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor, nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


@dataclass
class Step:
    """One micro-batch, as a loss term sees it.

    model: the student, unwrapped. inputs: what its forward was given.
    head: what kind of head it has, see `hf_compress.heads`.
    labels: (batch, positions) where labels[:, t] is what logits[:, t] predicts, -100 where nothing is; of sequence
    classifiers (batch,) or (batch, labels).
    num_items: how many label positions (or examples) the whole accumulated batch holds, on all ranks that share the
    average:
        a per-position term is its sum over this micro-batch divided by `num_items`.
    task_weight: of the task loss. chunked: a technique makes the task loss too, from hidden states.
    outputs: what the forward returned, None before it.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    head: str
    labels: Tensor
    num_items: Tensor | int
    task_weight: float
    chunked: bool = False
    outputs: Any = None


class Technique(TrainerCallback):
    """Base of `Distillation`, `Pruning`, `QAT`: a dataclass (``eq=False``) whose fields are the recipe's keys.

    The order of calls: `check`, `attach`, `prepare`, then every step `batches`, `around` and `loss_terms` and the
    callback events of transformers, `finalize`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def check(self) -> None:
        """Raise a CompressError for fields that cannot work, from them alone: recipes call it before any work."""

    def attach(self, model: nn.Module) -> None:
        """Before the optimizer exists: make masks, hooks and projections. Raise here whatever would fail later."""

    def prepare(self, trainer: CompressionTrainer) -> None:
        """After Trainer.__init__ and before the first step: prepare the teacher through the trainer's accelerator."""

    def batches(self, trainer: CompressionTrainer, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of the next optimizer step, before their items are counted; the same list where nothing
        changes."""
        return batches

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of its own that train with the model (projections, learned scales), as a group of their own."""
        return []

    @property
    def rate(self) -> float:
        """Learning rate of its own `parameters` over the model's."""
        return 1.0

    @contextmanager
    def around(self, step: Step) -> Iterator[None]:
        """Around the student's forward: what must happen before it, and what watches it."""
        yield

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        """Name -> weighted term (a scalar), added to the loss and logged under its name."""
        return {}

    def measures(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> sum and count since the last call, over this rank's evaluation batches; logged as ``eval_<name>``,
        the mean over all ranks."""
        return {}

    def progress(self) -> dict[str, float]:
        """Name -> how far a schedule has come; logged beside the loss."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors a resumed run needs (masks bit-packed, projections, scales); saved beside the checkpoint's
        weights."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; raise a CompressError when it does not fit the model."""

    def settled(self, step: int, max_steps: int) -> bool:
        """False while a schedule is still changing the model, so that no unfinished model is picked as the best."""
        return True

    def finalize(self, model: nn.Module) -> None:
        """Once, at the normal end of train(): bake masks, drop hooks and projections. The model stays usable."""

    def facts(self) -> dict[str, Any]:
        """What happened, for the card: JSON values only."""
        return {}
