"""One training run with any techniques together: distillation, gradual pruning, quantization-aware training, LoRA."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel, TrainingArguments

from hf_compress.coverage import coverage
from hf_compress.data import Data, Rows, prepare
from hf_compress.errors import CompressError, at, did_you_mean
from hf_compress.precision import bfloat16_is_fast
from hf_compress.stages.base import Done, Stage, Work, refuse_late
from hf_compress.stages.interruption import StopAfterSaving, last_whole_checkpoint
from hf_compress.techniques import Technique
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.distillation_options import check_task_weight
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.techniques.qat_options import check_beside
from hf_compress.trainer import CompressionTrainer
from hf_compress.weights import KINDS, weights

_ARGUMENTS = {  # name -> type
    name: kind
    for name, kind in typing.get_type_hints(TrainingArguments).items()
    if name in {f.name for f in dataclasses.fields(TrainingArguments)}
}
_OURS = {
    "output_dir": "the run's folder is chosen by --output",
    "seed": "set the recipe's own `seed`",
    "save_only_model": "an interrupted run goes on from its checkpoints, optimizer included",
    "hub_token": "recipes are published with the result; log in with `hf auth login`",
    "push_to_hub_token": "recipes are published with the result; log in with `hf auth login`",
    "push_to_hub": "give the recipe a `publish:` section; the finished folder is published, not a training checkpoint",
}


@dataclass
class Train(Stage):
    """``train: {distill: {teacher_model: dense}, prune: {sparsity: 0.5}, args: {max_steps: 1000}}``"""

    distill: Distillation | None = field(
        default=None, metadata={"help": "distillation, as the `Distillation` technique"}
    )
    prune: Pruning | None = field(default=None, metadata={"help": "gradual pruning, as the `Pruning` technique"})
    qat: QAT | None = field(default=None, metadata={"help": "quantization-aware training, as the `QAT` technique"})
    lora: dict[str, Any] | None = field(
        default=None, metadata={"help": "train LoRA adapters (peft LoraConfig fields) and merge them"}
    )
    extra_data: Data | None = field(
        default=None,
        metadata={"help": "more rows to train on, e.g. text to distil on (labels count unless task_weight is 0)"},
    )
    task_weight: float = field(default=1.0, metadata={"help": "weight of the task loss beside the techniques' terms"})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "regular expressions of parameters that do not train"}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "of every dropout layer while this stage trains; none = the model's own"}
    )
    args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "any TrainingArguments field; bf16: auto = where the machine has instructions for it"},
    )

    def check(self, work_kinds: list[str], *, where: str) -> None:
        refuse_late(work_kinds, where=where)
        for key, value in self.args.items():
            if key in _OURS:
                raise CompressError(f"{key} is not set here: {_OURS[key]}", where=f"{where}.args.{key}")
            if key not in _ARGUMENTS:
                raise CompressError(
                    f"TrainingArguments has no field {key!r}",
                    where=f"{where}.args",
                    next_step=did_you_mean(key, _ARGUMENTS),
                )
            if (key, value) == ("bf16", "auto"):
                continue
            if value is False and key.endswith("_strategy"):
                self.args[key] = "no"  # YAML reads no as false
            try:
                TypeAdapter(_ARGUMENTS[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
                    self.args[key]
                )
            except ValidationError as error:
                raise CompressError(
                    f"{error.errors()[0]['msg']} (got {value!r})",
                    where=f"{where}.args.{key}",
                    next_step=f"what TrainingArguments takes for {key}",
                ) from error
        try:
            self._arguments("unused", 0)
        except (ValueError, TypeError, ImportError) as error:
            raise CompressError(
                f"TrainingArguments refuses these: {str(error).splitlines()[0]}", where=f"{where}.args"
            ) from error
        for technique in self.techniques:
            with at(f"{where}: {{}}"):
                technique.check()
                if technique is self.qat:
                    check_beside(self.qat, pruned=self.prune is not None, adapted=self.lora is not None)
        if self.distill is not None:
            check_task_weight(self.distill, self.task_weight)
        if "quantize" in work_kinds and (self.lora is None or self.prune is not None or self.qat is not None):
            raise CompressError(
                "packed weights train only through LoRA, without masks and fake quantization",
                where=where,
                next_step="add `lora: {r: 16}` here, or put this stage before quantize",
            )

    @property
    def techniques(self) -> list[Technique]:
        return [technique for technique in (self.distill, self.prune, self.qat) if technique is not None]

    @property
    def length(self) -> str:
        """Of the run, as a person says it: ``1000 steps of 8 rows``."""
        args = self._arguments("unused", 0)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        how = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs in steps"
        return f"{how} of {rows} rows"

    def run(self, work: Work) -> Done:
        model, cached = work.model, getattr(work.model.config, "use_cache", None)
        self._name_labels(model, work)
        frozen = self._freeze(model)
        before = self._set_dropout(model)
        student: torch.nn.Module = self._with_lora(model, work) if self.lora is not None else model
        adapted = {name.split(".lora_A")[0] for name, _ in student.named_modules() if ".lora_A" in name}
        techniques = [self._resolved(technique, work) for technique in self.techniques]
        rows = self._rows(work)
        arguments = self._arguments(str(work.folder / "trainer"), work.seed)
        if "logging_steps" not in self.args:
            arguments.logging_steps = _logged_every(arguments, rows)
        if arguments.bf16 and arguments.use_cpu and not bfloat16_is_fast("cpu"):
            work.say("  this CPU has no instructions for bfloat16: several times slower than args: {bf16: auto}")
        stop = StopAfterSaving(work.say)
        trainer = CompressionTrainer(
            student,
            techniques=techniques,
            task_weight=self.task_weight,
            args=arguments,
            train_dataset=rows,
            eval_dataset=work.prepared.eval,
            data_collator=work.prepared.collator,
            processing_class=work.tokenizer,
            callbacks=[stop],
        )
        earlier = last_whole_checkpoint(work.folder / "trainer")
        if earlier is not None:
            work.say(f"  going on from {Path(earlier).name}")
        with stop:
            trainer.train(resume_from_checkpoint=earlier)
        if cached is not None:  # the Trainer switches it off, and what is saved would generate without a cache
            model.config.use_cache = cached
        own = {type(t).__name__: t.facts() for t in techniques}
        facts = {
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "bf16": arguments.bf16,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
            "frozen": frozen,
            "techniques": own,
            "notes": [note for each in own.values() for note in each.pop("notes", [])],
        }
        if self.distill is not None and isinstance(self.distill.teacher_model, str):
            facts["techniques"]["Distillation"]["teacher"] = (
                self.distill.teacher_model
            )  # its name, not a scratch folder
        if (
            self.lora is not None
        ):  # train() has merged them where masks or grids act on W + BA; then nothing is left to do
            model = student.merge_and_unload()  # type: ignore[operator]
        for module, p in before.items():
            module.p = p
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        scales = next((t.scales for t in techniques if isinstance(t, QAT)), {})
        trained = [
            w.name
            for w in weights(model, KINDS)
            if w.name in scales
            or (
                not any(re.search(p, w.name) for p in self.freeze)
                and (self.lora is None or any(name.endswith(w.module_name) for name in adapted))
            )
        ]
        return Done(model.eval(), facts, coverage(model, trained), quantized=work.quantized, scales=scales)

    @staticmethod
    def _resolved(technique: Technique, work: Work) -> Technique:
        """A copy, its teachers' names in the recipe (``dense``, a stage) replaced by the folders they stand for, and
        the layer map ``record`` by the layers that shrink stages since the teacher kept."""
        if not isinstance(technique, Distillation):
            return dataclasses.replace(technique)
        first = work.stages.get(str(technique.teacher_model), technique.teacher_model)
        several = [work.stages.get(name, name) for name in technique.teachers]
        mapped = technique.layer_map
        if mapped == "record":
            mapped = _kept_layers(work, several[0] if several else str(first))
        return dataclasses.replace(technique, teacher_model=first, teachers=several, layer_map=mapped)

    def _arguments(self, folder: str, seed: int) -> TrainingArguments:
        defaults: dict[str, Any] = {
            "report_to": "none",
            "save_total_limit": 1,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
        }
        given = defaults | self.args | {"output_dir": folder, "seed": seed}
        if given.get("bf16") == "auto":
            given["bf16"] = bfloat16_is_fast("cpu" if given["use_cpu"] else "cuda")
        return TrainingArguments(**given)

    def _rows(self, work: Work) -> Rows:
        train = work.prepared.train
        if self.extra_data is None:
            return train
        assert work.tokenizer is not None
        more = prepare(self.extra_data, work.tokenizer, task=work.task).train
        if isinstance(train, Dataset) and isinstance(more, Dataset):
            return concatenate_datasets([train, more.cast(train.features)])
        raise CompressError(
            "rows that are read as training goes cannot be mixed with others",
            where="train.extra_data",
            next_step="set streaming: false, or leave extra_data out",
        )

    def _freeze(self, model: PreTrainedModel) -> list[str]:
        frozen = []
        for pattern in self.freeze:
            names = [name for name, parameter in model.named_parameters() if re.search(pattern, name)]
            if not names:
                raise CompressError(
                    f"no parameter matches {pattern!r}",
                    where="train.freeze",
                    next_step="use a part of a name as in model.named_parameters()",
                )
            frozen += names
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        return frozen

    @staticmethod
    def _name_labels(model: PreTrainedModel, work: Work) -> None:
        """Give a classifier the data's label names, where it has only LABEL_0, LABEL_1."""
        labels = work.prepared.labels
        if labels and len(labels) != model.config.num_labels:
            raise CompressError(
                f"the data has {len(labels)} labels ({', '.join(labels[:5])}), the model {model.config.num_labels}",
                where="model.num_labels",
                next_step=f"num_labels: {len(labels)}, or filter the data",
            )
        unnamed = all(str(name).startswith("LABEL_") for name in (model.config.id2label or {}).values())
        if labels and unnamed and not all(name.isdigit() for name in labels):
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {name: index for index, name in enumerate(labels)}

    def _set_dropout(self, model: PreTrainedModel) -> dict[torch.nn.Dropout, float]:
        """Each dropout layer with the rate it had."""
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)] if self.dropout is not None else []
        before = {layer: layer.p for layer in layers}
        for layer in layers:
            layer.p = self.dropout if self.dropout is not None else layer.p
        return before

    def _with_lora(self, model: PreTrainedModel, work: Work) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        kind = {"causal-lm": "CAUSAL_LM", "text-classification": "SEQ_CLS"}[work.task]
        if work.quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.config._name_or_path = model.__dict__["name_or_path"] = work.checkpoint  # adapters record their base
        torch.manual_seed(work.seed)
        adapted: torch.nn.Module = get_peft_model(
            model, LoraConfig(**({"task_type": kind, "target_modules": "all-linear"} | (self.lora or {})))
        )
        return adapted


def _logged_every(arguments: TrainingArguments, rows: Rows) -> float:
    """Steps between two points of the loss curve: twenty, fewer in a run so short that it would have no curve."""
    steps = float(arguments.max_steps)
    if steps <= 0 and isinstance(rows, Dataset):  # rows without a length need max_steps
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        steps = len(rows) / batch * arguments.num_train_epochs
    return min(20, max(1, int(steps / 20)))


def _kept_layers(work: Work, teacher: str) -> list[int]:
    """The teacher's layer that each layer of the model was, by the records of the stages between the two.

    Raises:
        CompressError: no stage since the teacher removed layers, or the teacher is not of this recipe.
    """
    names = [name for name in work.stages if name != "dense"]
    origin = next((i for i, name in enumerate(names) if work.stages[name] == teacher), None)
    kept: list[int] | None = None
    for name in names[origin + 1 :] if origin is not None else []:
        record = json.loads((Path(work.stages[name]).parent / "record.json").read_text())
        layers = record["facts"].get("kept_layers")
        if layers is not None:
            kept = [kept[index] for index in layers] if kept is not None else layers
    if kept is None:
        raise CompressError(
            "no shrink stage between the teacher and here says which layers it kept",
            where="train.distill.layer_map: record",
            next_step="use a list, uniform or last, or a teacher of this recipe from before the shrink stage",
        )
    return kept
