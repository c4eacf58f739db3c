"""One arm of `qat_quality.py`: a task's dense model with its block matrices in few bits, and its held-out answers."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from schedules_arm import Task, answers
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_compress import QAT, CompressionTrainer, Distillation
from hf_compress.calibration import calibration_batches
from hf_compress.families import expert_options
from hf_compress.grids import Grid
from hf_compress.oneshot import compress_blocks, solvers
from hf_compress.precision import bfloat16_is_fast
from hf_compress.weights import weights

DENSE, PEER = "dense", "torchao QAT"
UNTRAINED = {"rtn": "rtn", "gptq": "gptq"}
METHODS = {  # method, distilled, start
    "QAT": ("lsq", False, "dense"),
    "QAD": ("lsq", True, "dense"),
    "QAD, ste": ("ste", True, "dense"),
    "QAD from gptq": ("lsq", True, "gptq"),
}
GROUP = 32


@dataclass(frozen=True)
class Arm:
    task: str
    method: str
    bits: int
    seed: int

    @property
    def file(self) -> str:
        method = self.method.replace(", ", "-").replace(" ", "-")
        return f"{self.task}-{method}-{self.bits}-{self.seed}.json"


def _train(model: PreTrainedModel, techniques: list[Any], arm: Arm, task: Task) -> dict[str, Any]:
    distilled = any(isinstance(t, Distillation) for t in techniques)
    fixed = {"bf16": bfloat16_is_fast("cpu"), "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
    fixed |= {"save_strategy": "no", "logging_steps": 10, "lr_scheduler_type": "cosine", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CompressionTrainer(
            model,
            techniques=techniques,
            task_weight=0.0 if distilled else 1.0,
            args=TrainingArguments(scratch, seed=arm.seed, **(fixed | task.training)),
            train_dataset=task.data.train,
            data_collator=task.data.collator,
            processing_class=task.tokenizer,
        )
        trainer.train()
    return {"loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def _peer(model: PreTrainedModel, bits: int) -> None:
    """torchao's fake quantization of the same matrices, where they are nn.Linear."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=GROUP, is_symmetric=True)
    names = {w.module_name for w in weights(model)}

    def chosen(module: nn.Module, name: str) -> bool:
        return name in names

    quantize_(model, QATConfig(weight_config=config, step="prepare"), chosen)
    done = sum(type(module).__name__ == "FakeQuantizedLinear" for module in model.modules())
    assert done == len(names), f"torchao covers {done} of {len(names)} matrices"


def made(arm: Arm, task: Task) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, its weights on the grid, and facts of how it came about."""
    model, _ = task.load()
    if arm.method == DENSE:
        return model, {}
    if arm.method == PEER:
        _peer(model, arm.bits)
        return model, _train(model, [], arm, task)
    grid = Grid(arm.bits, GROUP)
    if arm.method in UNTRAINED:
        solver = solvers[UNTRAINED[arm.method]](grid=grid)
        options = {"samples": task.calibration, "vocab_size": model.config.vocab_size, "seed": arm.seed}
        compress_blocks(model, calibration_batches(task.data, **options) if solver.needs else [], solver)
        return model, {}
    method, distilled, start = METHODS[arm.method]
    begun = {"start": start, "samples": task.calibration} if start == "gptq" else {}
    techniques: list[Any] = [QAT(arm.bits, GROUP, method=method, **begun)]
    if distilled:
        options = {"teacher_model_init_kwargs": expert_options(model.config), "temperature": task.temperature}
        techniques.append(Distillation(str(task.folder), **options))
    return model, _train(model, techniques, arm, task) | {"qat": techniques[0].facts()}


def run(arm: Arm, task: Task, output: Path) -> dict[str, Any]:
    """Facts of an arm: read where it is done, else made and stored."""
    path, settings = output / arm.file, task.training | {"temperature": task.temperature, "group": GROUP}
    if path.exists():
        facts: dict[str, Any] = json.loads(path.read_text())
        assert facts["settings"] == settings, f"{path} was made with {facts['settings']}: remove it to make it again"
        return facts
    used = time.process_time()
    model, facts = made(arm, task)
    facts |= {"settings": settings, "cpu_seconds": time.process_time() - used, "sparsity": 0.0}
    facts |= answers(model, task)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts))
    part.rename(path)
    return facts
