"""Learn from teachers: their soft targets, online or from a cache, and what happens inside their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.errors import CompressError
from hf_compress.heads import distribution
from hf_compress.losses import losses
from hf_compress.techniques.base import Step, Technique
from hf_compress.techniques.capture import Capture
from hf_compress.techniques.chunked import (
    Head,
    ask,
    chunked_loss,
    head_of,
    head_stands_in,
)
from hf_compress.techniques.distillation_options import check_options, check_student, check_task_weight
from hf_compress.techniques.features import FeatureTerm, feature_terms
from hf_compress.techniques.offline import Cache
from hf_compress.techniques.on_policy import mixed
from hf_compress.techniques.ramp import ramp
from hf_compress.techniques.soft_targets import FromOutputs, Objective, Online, SoftTargets, Teacher
from hf_compress.techniques.teacher import BASE, answering, as_classes, check_vocabulary, load_teacher
from hf_compress.weights import base_of

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer


@dataclass(eq=False)
class Distillation(Technique):
    """``Distillation(teacher_model="org/teacher", temperature=2.0)``: adds ``distill`` (and one term for each of
    `features`) to the loss.

    distill = weight * sum over predicted positions of T^2 loss(student / T, teacher / T) / num_items; of several
    teachers the weighted mean. A feature's term = its weight * sum over sequences of (mean over mapped blocks of its
    loss, with the first teacher) * items of the sequence / num_items, where items are predicted positions, or 1 for a
    sequence classifier. Every weight may go to another (`weight_end`) over the run, as `weight_schedule` says.

    Names are TRL's where TRL has one. At evaluation `eval_kl` (KL(first teacher || student) at temperature 1) and
    `eval_agreement` (of the likeliest class) are means over all items.
    """

    teacher_model: str | None = (
        field(  # or a loaded model; HfArgumentParser and recipes read the annotation, and both give text
            default=None,
            metadata={
                "help": "folder, Hub id; in a recipe also `dense` or a stage; `base`: the model under a LoRA student"
            },
        )
    )
    loss: str = field(default="forward_kl", metadata={"help": "logit loss: see `hf-compress list losses`"})
    temperature: float = field(default=2.0, metadata={"help": "softens both distributions"})
    weight: float = field(default=1.0, metadata={"help": "weight of the logit loss"})
    weight_end: float | None = field(
        default=None,
        metadata={"help": "weight at the end of training; none: as at its beginning (features: the same)"},
    )
    weight_schedule: str = field(
        default="linear", metadata={"help": "how weights (and taid) reach their end: linear or cosine"}
    )
    taid: float | None = field(
        default=None,
        metadata={"help": "the target's logits are (1 - t) student + t teacher, t rising from here to 1"},
    )
    lmbda: float = field(
        default=0.0,
        metadata={"help": "share of batches that the student writes itself, from their prompts; as in TRL"},
    )
    beta: float = field(
        default=0.5, metadata={"help": "of jsd, as in TRL: 0 is forward KL, 1 reverse KL; alpha_beta's"}
    )
    alpha: float = field(
        default=0.1, metadata={"help": "of skew_kl: its own side's share in the mixture; alpha_beta's"}
    )
    chunked: bool = field(
        default=False,
        metadata={"help": "logits a few positions at a time, task loss too: never a whole batch of vocabularies"},
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "positions in a chunk; none: an eighth, 128 to 512, or up to 256 at once"}
    )
    features: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "{loss: weight} or {loss: {weight:, layer_map:, option:}} of what blocks compute"},
    )
    layer_map: list[int] | str | None = field(
        default=None,
        metadata={
            "help": "teacher block of each student block: a list, `uniform` (the default), `last`, or `record`: as "
            "the shrink stages of the recipe kept them"
        },
    )
    teacher_model_init_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "passed to the teacher's from_pretrained"}
    )
    teacher_bits: int | None = field(default=None, metadata={"help": "8 or 4: load the teacher by bitsandbytes"})
    teachers: list[str] = field(default_factory=list, metadata={"help": "several, instead of teacher_model"})
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "answers that `hf-compress cache-teacher` wrote: no teacher in memory (forward_kl only)"},
    )
    teacher_weights: list[float] = field(default_factory=list, metadata={"help": "of `teachers`; none: equal"})

    def check(self) -> None:
        check_options(self)

    @property
    def learns_from_base(self) -> bool:
        """Whether a teacher is the model under a LoRA student."""
        return BASE in self.teachers or (isinstance(self.teacher_model, str) and self.teacher_model == BASE)

    def attach(self, model: nn.Module) -> None:
        student = base_of(model)
        check_student(self, student)
        self._cache = None if self.teacher_cache is None else Cache(self.teacher_cache)
        self._given: list[Any] = list(self.teachers) or ([] if self._cache else [self.teacher_model])
        weights = self.teacher_weights or [1.0] * len(self._given)
        self._shares = [w / sum(weights) for w in weights]
        init, bits = self.teacher_model_init_kwargs, self.teacher_bits
        self._teachers = [load_teacher(given, model, init=init, bits=bits) for given in self._given]
        traits = losses.entry(self.loss).traits
        self._soft = SoftTargets(
            self.loss, self.temperature, {name: getattr(self, name) for name in traits.get("options", ())}
        )
        self._distribution = distribution(student)
        heard = bool(self.weight or self.weight_end)
        if heard and self._distribution == "values" and traits["kind"] != "values":
            raise CompressError(
                f"a regression head has no distribution for {self.loss}",
                where="distill.loss",
                next_step="loss: mse",
            )
        self._terms: list[FeatureTerm] = []
        self._captures: list[Capture] = []
        if self.features:
            self._terms = feature_terms(self.features, student, base_of(self._teachers[0]), self.layer_map)
            sides = [{(t.kind, pair[side]) for t in self._terms for pair in t.pairs} for side in (0, 1)]
            self._captures = [Capture(student, sides[0]), Capture(self._teachers[0], sides[1])]
        self._heads: list[Head] = []
        if self.chunked:
            self._heads = [head_of(m) for m in (student, *self._teachers)]
        self._measured, self._done = torch.zeros(3), 0.0

    def prepare(self, trainer: CompressionTrainer) -> None:
        check_task_weight(self, trainer.task_weight)
        if self._cache is not None:
            self._cache.check(
                temperature=self.temperature,
                tokenizer=trainer.processing_class,
                teacher=self.teacher_model,
                vocabulary=base_of(trainer.model).config.get_text_config().vocab_size,
            )
        for index, given in enumerate(self._given):
            if given != BASE:
                teacher = self._teachers[index]
                if getattr(teacher, "hf_device_map", None) is None:
                    self._teachers[index] = trainer.accelerator.prepare_model(teacher, evaluation_mode=True)
                check_vocabulary(trainer, given, teacher)
        for term in self._terms:
            term.projections.to(trainer.args.device)

    def parameters(self) -> list[nn.Parameter]:
        return [p for term in self._terms for p in term.projections.parameters()]

    def batches(self, trainer: CompressionTrainer, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return mixed(trainer, batches, self.lmbda) if self.lmbda else batches

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._done = state.global_step / max(1, state.max_steps - 1)

    def _now(self, begin: float, end: float | None) -> float:
        return ramp(begin, end, self.weight_schedule, self._done)

    @contextmanager
    def around(self, step: Step) -> Iterator[None]:
        if self._distribution == "softmax" and step.labels.is_floating_point():
            raise CompressError(
                "labels are numbers, each learned on its own, and the student's config says classes",
                where="problem_type",
                next_step="set it to multi_label_classification or regression in the configs of student and teacher",
            )
        inputs = {k: v for k, v in step.inputs.items() if k != "labels"}
        if step.head in ("causal", "seq2seq"):  # a cache is never read, and with it packed texts see one another
            inputs["use_cache"] = False
        answers: list[Teacher] = [self._answer(i, inputs, step.chunked) for i in range(len(self._teachers))]
        answers += self._cached(step)
        with ExitStack() as stack:
            if self._captures:
                stack.enter_context(self._captures[0].on())
            if step.chunked:
                stack.enter_context(head_stands_in(self._heads[0].module, self._chunks(step, answers)))
            else:
                self._answers = answers
            yield

    def _cached(self, step: Step) -> list[Teacher]:
        """A cache holds training rows, so it has nothing to say at evaluation."""
        return [self._cache.answers(step)] if self._cache is not None and step.model.training else []

    def _answer(self, index: int, inputs: dict[str, Any], chunked: bool) -> Teacher:
        """What one teacher says of a batch: its logits, or where the loss is chunked what reaches its head."""
        teacher, share = self._teachers[index], self._shares[index]
        with ExitStack() as stack:
            stack.enter_context(answering(teacher, base=self._given[index] == BASE))
            if index == 0 and self._captures:
                stack.enter_context(self._captures[1].on())
            if chunked:
                return ask(teacher, self._heads[1 + index], inputs, share)
            return Online(partial(_rows_of, as_classes(teacher(**inputs).logits, self._distribution)), share)

    def _chunks(self, step: Step, teachers: Sequence[Teacher]) -> Callable[[Tensor], Tensor]:
        """The student's head for one step: from what reaches it to the loss, in the shape of logits.

        The loss is made inside the student's own forward and is what that returns, so that wrappers around the model
        (DDP) see every parameter at work.
        """

        def head(hidden: Tensor) -> Tensor:
            labels = step.labels.flatten() if step.task_weight or not step.model.training else None
            objective = self._objective(step, teachers, labels)
            total, self._sums = chunked_loss(self._heads[0], hidden, _trained(step), objective, self.chunk_size)
            self._total = total
            return total.expand(1, 1, 1)

        return head

    def _objective(self, step: Step, teachers: Sequence[Teacher], labels: Tensor | None = None) -> Objective:
        measure = not step.model.training and self._distribution != "values" and bool(teachers)
        weight = self._now(self.weight, self.weight_end)
        soft = self._soft
        if self.taid is not None and step.model.training:
            soft = replace(soft, share=self._now(self.taid, 1.0))
        return Objective(soft, teachers if weight or measure else [], weight, step.task_weight, labels, measure)

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        terms = {}
        answered = bool(self._teachers) or step.model.training  # a cache holds no evaluation rows
        if step.chunked:
            # one value with the gradient of both: what is logged as the task has none of its own
            terms["task"] = step.task_weight * self._sums[0] / step.num_items
            terms["distill"] = self._total / step.num_items - terms["task"]
            self._measure(step, self._sums, len(_trained(step)))
        elif answered and (self.weight or self.weight_end or not step.model.training):
            kind = self._distribution
            flat = as_classes(step.outputs.logits, kind)
            rows = _trained(step) if kind != "sigmoid" else torch.arange(len(flat), device=flat.device)
            total, sums = FromOutputs.apply(flat, rows, self._objective(step, self._answers))  # type: ignore[no-untyped-call]
            self._answers = []  # of the size of the student's logits: not to be kept while backward runs
            items = step.num_items * (step.labels.shape[1] if kind == "sigmoid" else 1)
            terms["distill"] = total / items
            self._measure(step, sums, len(rows))
        mask, items_of = _where(step)
        for term in self._terms:
            each_sequence = term(self._captures[0], self._captures[1], mask) * items_of
            if torch.is_grad_enabled() and not each_sequence.requires_grad:
                raise CompressError(
                    "no gradient comes back from where it looks, so it would teach nothing",
                    where=f"distill.features.{term.name}",
                    next_step="gradient_checkpointing_kwargs: {use_reentrant: false}, or let those blocks train",
                )
            terms[term.name] = self._now(term.weight, term.weight_end) * each_sequence.sum() / step.num_items
        if not answered:
            terms.pop("distill", None)
        return terms

    def _measure(self, step: Step, sums: Tensor, count: int) -> None:
        if not step.model.training and self._distribution != "values" and self._teachers:
            self._measured = self._measured.to(sums.device)
            self._measured += torch.stack([sums[2], sums[3], sums.new_tensor(count)])

    def measures(self) -> dict[str, tuple[Tensor, Tensor]]:
        kl, same, count = self._measured
        self._measured = torch.zeros(3)
        silent = self._distribution == "values" or not self._teachers
        return {} if silent else {"kl": (kl, count), "agreement": (same, count)}

    def state(self) -> dict[str, Tensor]:
        return {
            f"projection.{term.name}.{key}": value
            for term in self._terms
            for key, value in term.projections.state_dict().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in self.state().items()}:
            raise CompressError(
                "the checkpoint's projections are of other features, layer maps or widths",
                where="distill.features",
                next_step="resume with the features that were interrupted",
            )
        for term in self._terms:
            prefix = f"projection.{term.name}."
            term.projections.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )

    def finalize(self, model: nn.Module) -> None:
        for capture in reversed(self._captures):  # teacher and student may be one model
            capture.remove()
        self._terms, self._captures = [], []

    def facts(self) -> dict[str, Any]:
        given = self._given or [self._cache.facts["teacher"] if self._cache else None]
        teachers = [name if isinstance(name, str) else type(name).__name__ for name in given]
        options = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("teacher")}
        return options | {
            "teacher": teachers[0] if len(teachers) == 1 else teachers,
            "teacher_bits": self.teacher_bits,
            "teacher_weights": self.teacher_weights,
            "teacher_cache": self._cache.facts if self._cache else None,
        }


def _rows_of(outputs: Tensor, part: Tensor) -> Tensor:
    return outputs[part]


def _trained(step: Step) -> Tensor:
    """Indexes of the rows that are learned, of outputs flattened to (rows, classes)."""
    if step.head == "sequence":
        return torch.arange(len(step.labels), device=step.labels.device)
    return (step.labels.flatten() != -100).nonzero().squeeze(-1)


def _where(step: Step) -> tuple[Tensor, Tensor]:
    """Where feature losses look, (batch, positions), and how many items each sequence counts for, (batch,)."""
    if step.head != "sequence":
        mask = step.labels != -100
        return mask, mask.sum(1)
    ids = step.inputs["input_ids"]
    mask = step.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return mask, torch.ones(len(mask), device=mask.device)
