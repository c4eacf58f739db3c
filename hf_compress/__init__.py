"""Make Transformers models smaller and faster: quantization, pruning and distillation, alone or together."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# transformers imports torchao where it is installed, and torchao tells which GPU libraries it did not find
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "Enum subclass" not in record.getMessage())

if TYPE_CHECKING:
    from hf_compress.backends import quantize
    from hf_compress.data import Data
    from hf_compress.evaluation import Evaluate, evaluate
    from hf_compress.oneshot import prune
    from hf_compress.pipeline import compress
    from hf_compress.planning import plan
    from hf_compress.recipe import Recipe
    from hf_compress.surgery import shrink
    from hf_compress.techniques.distillation import Distillation
    from hf_compress.techniques.pruning import Pruning
    from hf_compress.techniques.qat import QAT
    from hf_compress.trainer import CompressionTrainer
    from hf_compress.trainers import DistillationTrainer, PruningTrainer, QATTrainer
    from hf_compress.verification import verify

_HOME = {
    "compress": "pipeline",
    "plan": "planning",
    "Recipe": "recipe",
    "shrink": "surgery",
    "prune": "oneshot",
    "quantize": "backends",
    "evaluate": "evaluation",
    "Evaluate": "evaluation",
    "Data": "data",
    "verify": "verification",
    "Distillation": "techniques.distillation",
    "Pruning": "techniques.pruning",
    "QAT": "techniques.qat",
    "CompressionTrainer": "trainer",
    "DistillationTrainer": "trainers",
    "PruningTrainer": "trainers",
    "QATTrainer": "trainers",
}
__all__ = [
    "QAT",
    "CompressionTrainer",
    "Data",
    "Distillation",
    "DistillationTrainer",
    "Evaluate",
    "Pruning",
    "PruningTrainer",
    "QATTrainer",
    "Recipe",
    "compress",
    "evaluate",
    "plan",
    "prune",
    "quantize",
    "shrink",
    "verify",
]


def __getattr__(name: str) -> object:
    """Public names load on first use, so that ``import hf_compress`` and ``hf-compress --help`` are quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_compress.{_HOME[name]}"), name)
