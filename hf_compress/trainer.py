"""transformers' Trainer with techniques: each adds its terms to the loss and lives through attach, prepare, step,
save, resume, finalize."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import strtobool

from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.errors import CompressError
from hf_compress.heads import count as count_items
from hf_compress.heads import count_labelled, head_of, targets
from hf_compress.techniques.base import Step, Technique
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.lora import merged
from hf_compress.techniques.own_parameters import OwnParameters
from hf_compress.techniques.state import load_state, save_state
from hf_compress.trainer_push import PublishingTrainer, check_arguments
from hf_compress.weights import base_of, rounds_inputs

LAUNCHED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # what `accelerate launch` sets, and the Trainer obeys


class CompressionTrainer(PublishingTrainer):
    """``CompressionTrainer(model, techniques=[Distillation("org/teacher"), Pruning(sparsity=0.5)],
    args=TrainingArguments("out"), ...)``.

    loss = task_weight * task + the sum of the techniques' terms, each a sum over label positions (examples, for a
    classifier) divided by their number in the whole accumulated batch on all ranks: n micro-batches of 1 train as 1
    of n does. `eval_loss` is the task loss alone, `eval_<term>` the mean of a term over all evaluated items (where
    rows do not share out evenly among ranks, accelerate repeats some). The balance that mixtures of experts ask for
    with `output_router_logits` is a term of its own, `balance`, which sees one micro-batch at a time.

    Args:
        techniques: in any order; the order changes nothing.
        task_weight: 0 trains on the techniques' terms alone.
        peft_config: a peft config: the model trains through adapters of that kind.
        others: as `transformers.Trainer`.

    Raises:
        CompressError: two techniques of one kind; a model whose labels' positions are not known (see
        `hf_compress.heads`); a second train(); DeepSpeed, FSDP or label smoothing are asked for; whatever a technique
        finds wrong before training.
    """

    loss_is_scaled_for_ga = True
    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        techniques: Sequence[Technique] = (),
        task_weight: float = 1.0,
        args: TrainingArguments,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        sharded = args.deepspeed or args.fsdp or any(strtobool(os.environ.get(name, "0")) for name in LAUNCHED)
        if sharded or args.label_smoothing_factor:
            raise CompressError(
                "DeepSpeed, FSDP and label smoothing have not been shown to work with techniques",
                where="TrainingArguments, or what `accelerate launch` was asked for",
                next_step="train on one device or with plain DDP (torchrun), without label smoothing",
            )
        if args.n_gpu > 1 and getattr(model, "hf_device_map", None) is None:
            raise CompressError(
                f"one process would copy the model to {args.n_gpu} GPUs at every step (nn.DataParallel), and what "
                "techniques attach to it would be shared by threads",
                where="TrainingArguments",
                next_step=f"torchrun --nproc_per_node {args.n_gpu} SCRIPT for all, CUDA_VISIBLE_DEVICES=0 for one",
            )
        if others.get("compute_loss_func") is not None:
            raise CompressError(
                "the task loss is the model's own, and compute_loss_func would not be called",
                where="compute_loss_func",
                next_step="leave it out, or compute that loss in the model's forward",
            )
        check_arguments(args)
        disable_cpu_packing(model)
        dead = next((name for name, parameter in model.named_parameters() if rounds_inputs(parameter)), None)
        if dead is not None:
            raise CompressError(
                "torchao passes no gradient back through rounded activations",
                where=dead,
                next_step="train before they are rounded, or on weights alone",
            )
        kinds = [type(t).__name__ for t in techniques]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise CompressError(
                f"two techniques of one kind in one run: {', '.join(twice)}",
                where="techniques",
                next_step="give one of each kind",
            )
        self.techniques, self.task_weight = sorted(techniques, key=lambda t: type(t).__name__), task_weight
        self._logged: dict[str, Tensor] = {}
        self._logged_steps = 0
        self._eval_logged: dict[str, list[Tensor]] = defaultdict(list)
        self._evaluated = "eval"
        self._head = head_of(base_of(model))
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self._chunked = any(isinstance(t, Distillation) and t.chunked for t in techniques)
        if self._chunked and (args.torch_compile or self._head not in ("causal", "seq2seq")):
            raise CompressError(
                "chunked losses are for language models that are not compiled",
                where="distill.chunked",
                next_step="set chunked: false, or leave torch_compile out",
            )
        self._logits_wanted = False
        self._trained = False
        for technique in self.techniques:
            technique.check()
        for technique in self.techniques:
            technique.attach(model)
        callbacks = [*(others.pop("callbacks", None) or []), *self.techniques, OwnParameters(self.techniques)]
        super().__init__(model, args=args, callbacks=callbacks, **others)
        for technique in self.techniques:
            technique.prepare(self)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for technique in self.techniques:
            if own := [parameter for parameter in technique.parameters() if id(parameter) not in there]:
                if self.lr_scheduler is not None:  # which knows the groups that there were when it was made
                    raise CompressError(
                        f"{type(technique).__name__} brings parameters of its own, and the scheduler that was given "
                        "has no rate for them",
                        where="optimizers",
                        next_step="give the optimizer alone: optimizers=(optimizer, None)",
                    )
                rate = self.args.learning_rate * technique.rate
                optimizer.add_param_group({"params": own, "weight_decay": 0.0, "lr": rate})
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = torch.tensor(sum(count_items(self._head, batch["labels"]) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp_min(1)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Tensor | int | None]:
        given, items = super().get_batch_samples(*args)
        batches = given
        for technique in self.techniques:
            batches = technique.batches(self, batches)
        return batches, items if batches is given else self._get_num_items_in_batch(batches, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "labels" not in inputs:
            raise CompressError(
                "the batches hold no labels",
                where="train_dataset, data_collator",
                next_step="for a language model: data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)",
            )
        labels = inputs["labels"]
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], labels.device)
            assert num_items_in_batch is not None
        if model.training and not self._logged:
            self._logged_steps = self.state.global_step
        student = base_of(model)
        if self._head == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs = inputs | {"decoder_input_ids": student.prepare_decoder_input_ids_from_labels(labels=labels)}
        chunked = self._chunked and not self._logits_wanted
        aligned, weight = targets(self._head, labels), self.task_weight if model.training else 1.0
        step = Step(student, inputs, self._head, aligned, num_items_in_batch, weight, chunked)
        given = {k: v for k, v in inputs.items() if k != "labels"} if chunked else inputs
        scaled = self._head == "causal" and self.model_accepts_loss_kwargs and not chunked
        with ExitStack() as stack:
            for technique in self.techniques:
                stack.enter_context(technique.around(step))
            outputs = model(**given, **({"num_items_in_batch": num_items_in_batch} if scaled else {}))
        step.outputs = outputs
        terms: dict[str, Tensor] = {}
        balance = _balance(student, outputs) if self._head == "causal" else None
        if balance is not None:
            terms["balance"] = weight * balance * count_items(self._head, labels) / num_items_in_batch
        if not chunked:
            task = outputs.loss if balance is None else outputs.loss - balance
            if not scaled:  # a mean over this micro-batch, of nothing where it holds no labels
                seen = count_labelled(self._head, labels)
                task = task * seen / num_items_in_batch if seen else outputs.logits.sum() * 0.0
            terms["task"] = weight * task
        for technique in self.techniques:
            more = technique.loss_terms(step)
            assert not terms.keys() & more.keys(), f"two loss terms of one name: {terms.keys() & more.keys()}"
            terms |= more
        factor = (
            self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        )  # DDP averages what is already divided by all
        if model.training:
            for name, value in terms.items():
                self._logged[name] = self._logged.get(name, 0.0) + value.detach() * factor
            loss = torch.stack([terms[name] for name in sorted(terms)]).sum() * factor
        else:
            items = torch.tensor(float(count_items(self._head, labels)), device=labels.device)
            for name, value in terms.items():
                if name != "task":
                    self._eval_logged[name].append(torch.stack([value.detach() * num_items_in_batch, items]))
            loss = terms["task"].detach() * factor
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kw: Any) -> Any:
        self._evaluated = metric_key_prefix  # of a dict of datasets each has its own
        self._eval_logged.clear()
        for technique in self.techniques:
            technique.measures()  # what predict(), which logs nothing, or an evaluation that failed left behind
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kw)

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kw: Any) -> Any:
        self._logits_wanted = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kw)
        finally:
            self._logits_wanted = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._logged:
            steps = max(1, self.state.global_step - self._logged_steps)
            logs |= {
                f"loss_{name}": float(self.accelerator.gather(value.reshape(1)).mean()) / steps
                for name, value in sorted(self._logged.items())
            }
            self._logged = {}
        if "loss" in logs:
            for technique in self.techniques:
                logs |= technique.progress()
        if f"{self._evaluated}_loss" in logs:
            measured = {name: torch.stack(batches).sum(0) for name, batches in self._eval_logged.items()}
            self._eval_logged.clear()
            for technique in self.techniques:
                measured |= {name: torch.stack(pair) for name, pair in technique.measures().items()}
            for name, pair in measured.items():
                total, items = self.accelerator.reduce(pair.to(self.args.device), "sum")
                logs[f"{self._evaluated}_{name}"] = float(total / items.clamp_min(1))
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._trained and self.techniques:
            raise CompressError(
                "this trainer has finished: its techniques have let go of the model",
                where="train()",
                next_step="make a new CompressionTrainer",
            )
        outcome = super().train(*args, **kwargs)
        self._trained = True
        self.accelerator.unwrap_model(
            self.model, keep_fp32_wrapper=False
        )  # else its forward stays inside bf16 autocast for ever
        plain = merged(self.model)
        if plain is not self.model:
            self.model = self.model_wrapped = plain
        for technique in self.techniques:
            technique.finalize(self.model)
        return outcome

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        if not all(t.settled(self.state.global_step, self.state.max_steps) for t in self.techniques):
            return False
        return bool(super()._determine_best_metric(*args, **kwargs))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_state(folder, self.techniques)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(resume_from_checkpoint)
        load_state(Path(resume_from_checkpoint), self.techniques)
        if not any((Path(resume_from_checkpoint) / name).exists() for name in ("optimizer.pt", "optimizer.bin")):
            raise CompressError(
                "the checkpoint holds no state of the optimizer: a run that went on would be another run",
                where=str(resume_from_checkpoint),
                next_step="train without save_only_model, or begin anew with this checkpoint as the model",
            )

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._load_weights(best)
        load_state(Path(best), self.techniques)

    def _load_weights(self, folder: str) -> None:
        """Through from_pretrained: the raw state dict holds experts one by one, and loading it leaves the stacked
        ones as they were."""
        if hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(folder)
            return
        student = self._student
        saved, info = type(student).from_pretrained(folder, dtype=student.dtype, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise CompressError(
                "the checkpoint lacks weights of the model",
                where=folder,
                next_step="missing: " + ", ".join(sorted(info["missing_keys"])[:5]),
            )
        student.load_state_dict(saved.state_dict())


def _balance(student: Any, outputs: Any) -> Tensor | None:
    """What mixtures of experts that return router logits add to the loss of each micro-batch, whatever its size:
    how evenly its own tokens use the experts. None of other models."""
    even = outputs.get("aux_loss")
    return None if even is None else student.router_aux_loss_coef * even
