"""Things that answer: a checkpoint folder in torch, an ONNX file, or a folder that another environment opens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.environments import python_for, worker
from hf_compress.environments.workers.feeds import feeds
from hf_compress.families import expert_options
from hf_compress.source import TASKS, ModelSource, weight_files

Predict = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Artefact:
    """Something that answers: a checkpoint folder in torch, an ONNX file, or a folder that another environment opens.
    `predict`: (batch of tensors) -> logits. clock: wall and CPU seconds of the last answer, where it was measured
    elsewhere; close: ends that process."""

    name: str
    predict: Predict
    weights_bytes: int
    model: PreTrainedModel | None = None
    clock: Callable[[], dict[str, float]] | None = None
    close: Callable[[], None] = lambda: None


def open_folder(name: str, folder: str, task: str, device: str = "cpu") -> Artefact:
    """A checkpoint through plain from_pretrained, in eval mode, on `device` (cpu, or cuda, the first GPU); in the
    environment of its library where it needs one."""
    if Path(folder).is_dir() and python_for(Path(folder)) != Path(sys.executable):
        return open_elsewhere(name, "gptq", Path(folder))
    options: dict[str, Any] = dict(expert_options(transformers.AutoConfig.from_pretrained(folder)))
    if torch.cuda.is_available():  # else bitsandbytes would go to the GPU by itself, and nothing else
        options["device_map"] = {"": device}
    model: PreTrainedModel = getattr(transformers, TASKS[task]).from_pretrained(folder, **options).eval()
    disable_cpu_packing(model)

    @torch.no_grad()
    def predict(batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**{k: v.to(model.device) for k, v in batch.items()}).logits
        return logits.float().cpu()

    return Artefact(
        name,
        predict,
        sum(p.stat().st_size for p in weight_files(ModelSource(id=folder))),
        model,
    )


def open_elsewhere(name: str, library: str, folder: Path) -> Artefact:
    """A folder in the environment of the library that wrote it; the process ends with `Artefact.close`."""
    answers = worker.open_elsewhere(library, folder)
    size = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    recorded = folder / worker.EXPECTATION
    size -= recorded.stat().st_size if recorded.exists() else 0
    return Artefact(name, answers, size, clock=lambda: answers.seconds, close=answers.close)


def open_onnx(name: str, path: Path) -> Artefact:
    """An ONNX file in onnxruntime, on as many threads as torch uses."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def predict(batch: dict[str, Tensor]) -> Tensor:
        inputs = feeds(session, *(batch[k].numpy() for k in ("input_ids", "attention_mask")))
        (logits,) = session.run(["logits"], inputs)
        return torch.from_numpy(logits)

    return Artefact(name, predict, path.stat().st_size)
