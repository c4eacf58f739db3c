"""Learn from a teacher: its soft targets, and its hidden states where the widths need a projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.errors import CompressError
from hf_compress.losses import losses
from hf_compress.techniques.base import Step, Technique
from hf_compress.weights import base_of, blocks_of

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer

# what a recipe may say of how a teacher is loaded: nothing that runs code or reads pickles, no tokens
TEACHER_OPTIONS = ("attn_implementation", "device_map", "dtype", "experts_implementation", "revision", "subfolder")
CHUNK = 256  # positions whose probabilities exist at once


@dataclass(eq=False)
class Distillation(Technique):
    """``Distillation(teacher_model="org/teacher", temperature=2.0)``: adds ``kl`` (and ``hidden``) to the loss.

    kl = weight * sum over predicted positions of loss(student, teacher) / num_items.
    hidden = hidden_weight * the mean over student blocks of `hidden_mse` to the mapped teacher block, over the same
    positions (classifiers: over each example's own tokens, averaged within the example).
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
    hidden_weight: float = field(default=0.0, metadata={"help": "weight of the hidden-state loss"})
    layer_map: list[int] | None = field(
        default=None, metadata={"help": "teacher block of each student block; none: evenly spaced"}
    )
    teacher_model_init_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "passed to the teacher's from_pretrained"}
    )

    def check(self) -> None:
        if self.teacher_model is None:
            raise CompressError(
                "distillation needs a teacher",
                where="distill.teacher_model",
                next_step="a folder, a Hub id, or `dense` in a recipe",
            )
        if losses.entry(self.loss, where="distill.loss").traits["kind"] != "logits":
            raise CompressError(
                f"{self.loss!r} is not a logit loss",
                where="distill.loss",
                next_step="hidden states are weighted by hidden_weight",
            )
        for key in self.teacher_model_init_kwargs:
            if key not in TEACHER_OPTIONS:
                raise CompressError(
                    f"the teacher cannot be loaded with {key!r}",
                    where="distill.teacher_model_init_kwargs",
                    next_step="allowed: " + ", ".join(TEACHER_OPTIONS),
                )
        if not self.temperature > 0:
            raise CompressError(f"temperature {self.temperature} is not positive", where="distill.temperature")

    def attach(self, model: nn.Module) -> None:
        student = base_of(model)
        self._projections, self._map = nn.ModuleList(), list[int]()
        self.teacher = self._load_teacher(model)
        teacher = base_of(self.teacher)
        if (
            teacher.config.num_labels != student.config.num_labels
            and "SequenceClassification" in type(student).__name__
        ):
            raise CompressError(
                f"the teacher has {teacher.config.num_labels} labels, the student {student.config.num_labels}",
                where="distill.teacher_model",
            )
        if self.hidden_weight:
            self._map = self._layers(len(blocks_of(student)), len(blocks_of(teacher)))
            ours, theirs = student.config.hidden_size, teacher.config.hidden_size
            if ours != theirs:
                torch.manual_seed(0)
                self._projections = nn.ModuleList(nn.Linear(ours, theirs, bias=False) for _ in self._map)

    def _load_teacher(self, model: nn.Module) -> nn.Module:
        if self.teacher_model == "base":
            if not hasattr(model, "disable_adapter"):
                raise CompressError(
                    "`base` is the model under a LoRA student, and this student has no adapters",
                    where="distill.teacher_model",
                )
            return model
        if isinstance(self.teacher_model, str):
            auto = (
                AutoModelForSequenceClassification
                if "SequenceClassification" in type(base_of(model)).__name__
                else AutoModelForCausalLM
            )
            teacher: nn.Module = auto.from_pretrained(
                self.teacher_model, **self.teacher_model_init_kwargs, use_safetensors=True, trust_remote_code=False
            )
            disable_cpu_packing(teacher)
        else:
            teacher = cast(nn.Module, self.teacher_model)
        return teacher.eval().requires_grad_(False)

    def _layers(self, ours: int, theirs: int) -> list[int]:
        if self.layer_map is None:
            return [round((i + 1) * theirs / ours) - 1 for i in range(ours)]
        if len(self.layer_map) != ours or not all(0 <= t < theirs for t in self.layer_map):
            raise CompressError(
                f"layer_map {self.layer_map} does not map {ours} student blocks to some of {theirs} teacher blocks",
                where="distill.layer_map",
                next_step="give a list of block indexes, or leave layer_map out",
            )
        return self.layer_map

    def prepare(self, trainer: CompressionTrainer) -> None:
        if self.teacher_model != "base":
            if getattr(self.teacher, "hf_device_map", None) is None:
                self.teacher = trainer.accelerator.prepare_model(self.teacher, evaluation_mode=True)
            self._check_vocabulary(trainer)
        self._projections.to(trainer.args.device)

    def _check_vocabulary(self, trainer: CompressionTrainer) -> None:
        ours, theirs = trainer.processing_class, base_of(self.teacher).config
        if isinstance(self.teacher_model, str) and ours is not None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.teacher_model)
            except (OSError, ValueError):
                tokenizer = None  # a teacher saved without its tokenizer: the sizes below are all there is to compare
            if tokenizer is not None and tokenizer.get_vocab() != ours.get_vocab():
                raise CompressError(
                    "teacher and student have different tokenizers: their logits are not about the same tokens",
                    where=f"distill.teacher_model {self.teacher_model!r}",
                    next_step="use a teacher of the same tokenizer",
                )
        size = base_of(trainer.model).config.vocab_size
        smallest = len(ours) if ours is not None else max(size, theirs.vocab_size)
        if min(size, theirs.vocab_size) < smallest:
            raise CompressError(
                f"teacher vocabulary {theirs.vocab_size}, student {size}",
                where="distill.teacher_model",
                next_step="use a teacher of the same tokenizer",
            )

    def parameters(self) -> list[nn.Parameter]:
        return list(self._projections.parameters())

    def request(self) -> dict[str, Any]:
        return {"output_hidden_states": True} if self.hidden_weight else {}

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        inputs = {k: v for k, v in step.inputs.items() if k != "labels"}
        training = step.model.training
        with torch.no_grad(), self.teacher.disable_adapter() if self.teacher_model == "base" else nullcontext():  # type: ignore[operator]
            if self.teacher_model == "base":
                self.teacher.eval()
            taught = self.teacher(**inputs, **self.request())
            if self.teacher_model == "base":
                self.teacher.train(training)
        student, teacher = step.outputs.logits, taught.logits
        common = min(student.shape[-1], teacher.shape[-1])  # vocabularies may be padded to different sizes
        rows = (
            (step.labels.flatten() != -100).nonzero().squeeze(-1)
            if student.dim() == 3
            else torch.arange(len(student), device=student.device)
        )
        terms = {}
        if self.weight:
            loss = partial(losses[self.loss], temperature=self.temperature)
            total: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
                student.flatten(0, -2)[:, :common], teacher.flatten(0, -2)[:, :common], rows, loss
            )
            terms["kl"] = self.weight * total / step.num_items
        if self.hidden_weight:
            terms["hidden"] = self.hidden_weight * self._hidden(step, taught, rows) / step.num_items
        return terms

    def _hidden(self, step: Step, taught: Any, rows: Tensor) -> Tensor:
        """Sum over predicted positions (causal), or over examples of the mean over their tokens (classifiers)."""
        classifier = step.outputs.logits.dim() == 2
        mask = step.inputs.get("attention_mask") if classifier else None
        total = torch.zeros((), device=step.outputs.logits.device)
        for index, block in enumerate(self._map):
            ours, theirs = step.outputs.hidden_states[index + 1], taught.hidden_states[block + 1]
            ours = self._projections[index](ours.float()) if len(self._projections) else ours
            each = losses["hidden_mse"](ours.flatten(0, 1), theirs.flatten(0, 1))
            if classifier:
                each = each.view(theirs.shape[:2])
                weight = torch.ones_like(each) if mask is None else mask.float()
                total = total + ((each * weight).sum(1) / weight.sum(1)).sum()
            else:
                total = total + each[rows].sum()
        return total / len(self._map)

    def state(self) -> dict[str, Tensor]:
        return {f"projection.{k}": v for k, v in self._projections.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._projections.load_state_dict({k.removeprefix("projection."): v for k, v in state.items()})

    def finalize(self, model: nn.Module) -> None:
        self._projections = nn.ModuleList()

    def facts(self) -> dict[str, Any]:
        teacher = self.teacher_model if isinstance(self.teacher_model, str) else type(self.teacher_model).__name__
        return {
            "teacher": teacher,
            "loss": self.loss,
            "temperature": self.temperature,
            "weight": self.weight,
            "hidden_weight": self.hidden_weight,
            "layer_map": self._map or None,
        }


class _Chunked(torch.autograd.Function):
    """Sum of a per-position loss over `rows`, a chunk at a time, so the fp32 probabilities of only `CHUNK` positions
    exist at once.

    The gradient is made in the forward, chunk by chunk, in the dtype of the logits: the one tensor of their size that
    backward needs anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for part in rows.split(CHUNK):
            with torch.enable_grad():
                logits = student[part].detach().requires_grad_()
                value = loss(logits, teacher[part]).sum()
            if gradient is not None:
                gradient[part] = torch.autograd.grad(value, logits)[0]
            if not torch.isfinite(value) and not torch.isfinite(teacher[part]).all():
                raise CompressError(
                    "the teacher's logits are not finite",
                    where="distillation",
                    next_step="check the teacher's dtype and inputs",
                )
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None
