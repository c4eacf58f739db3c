"""Where a head's labels stand, and how many items a batch of them holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import CompressError

HEADS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "seq2seq",
    "ForTokenClassification": "tokens",
    "ForSequenceClassification": "sequence",
}


def head_of(model: PreTrainedModel) -> str:
    """``causal``, ``seq2seq``, ``tokens`` or ``sequence``.

    Raises:
        CompressError: any other class.
    """
    name = type(model).__name__
    kind = next((kind for suffix, kind in HEADS.items() if name.endswith(suffix)), "")
    if not kind or (kind == "seq2seq") != bool(model.config.is_encoder_decoder and kind != "sequence"):
        raise CompressError(
            f"where the labels of {name} stand is not known here",
            where="CompressionTrainer",
            next_step="techniques take causal and encoder-decoder language models, token and sequence classifiers",
        )
    return kind


def targets(kind: str, labels: Tensor) -> Tensor:
    """Labels where the head predicts them: (batch, positions), moved one back for causal models, -100 where nothing
    is; sequence classifiers' as they are, (batch,) or (batch, labels)."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100) if kind == "causal" else labels


def count(kind: str, labels: Tensor) -> int:
    """Label positions; of a sequence classifier, examples."""
    return len(labels) if kind == "sequence" else int((targets(kind, labels) != -100).sum())


def count_labelled(kind: str, labels: Tensor) -> int:
    """Those of them that have a label: a classifier may be given examples without (-100), to learn from a teacher."""
    classes = kind == "sequence" and not labels.is_floating_point()
    return int((labels != -100).sum()) if classes else count(kind, labels)


def distribution(model: PreTrainedModel) -> str:
    """What a head's outputs are: ``softmax`` over classes, ``sigmoid`` of each label, or ``values`` (regression)."""
    config: Any = model.config
    if head_of(model) != "sequence":
        return "softmax"
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return "values"
    return "sigmoid" if config.problem_type == "multi_label_classification" else "softmax"
