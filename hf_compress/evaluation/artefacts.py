"""Things that answer: a checkpoint folder in torch, or an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.families import expert_options
from hf_compress.source import TASKS, ModelSource, weight_files

Predict = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Artefact:
    """Something that answers: a checkpoint folder in torch, or an ONNX file. `predict`: (batch of tensors) ->
    logits."""

    name: str
    predict: Predict
    weights_bytes: int
    model: PreTrainedModel | None = None


def open_folder(name: str, folder: str, task: str) -> Artefact:
    """A checkpoint through plain from_pretrained, in eval mode."""
    options = expert_options(transformers.AutoConfig.from_pretrained(folder))
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


def open_onnx(name: str, path: Path) -> Artefact:
    """An ONNX file in onnxruntime, on as many threads as torch uses."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def predict(batch: dict[str, Tensor]) -> Tensor:
        (logits,) = session.run(None, {k: batch[k].numpy() for k in ("input_ids", "attention_mask")})
        return torch.from_numpy(logits)

    return Artefact(name, predict, path.stat().st_size)
