"""Make Transformers models smaller and faster: quantization, pruning and distillation, alone or together."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_compress.pipeline import compress
    from hf_compress.recipe import Recipe
    from hf_compress.surgery import drop_layers, shrink_ffn
    from hf_compress.techniques.distillation import Distillation
    from hf_compress.techniques.pruning import Pruning
    from hf_compress.techniques.qat import QAT
    from hf_compress.trainer import CompressionTrainer, DistillationTrainer, PruningTrainer, QATTrainer
    from hf_compress.verify import verify

_HOME = {
    "compress": "pipeline",
    "Recipe": "recipe",
    "drop_layers": "surgery",
    "shrink_ffn": "surgery",
    "Distillation": "techniques.distillation",
    "Pruning": "techniques.pruning",
    "QAT": "techniques.qat",
    "CompressionTrainer": "trainer",
    "DistillationTrainer": "trainer",
    "PruningTrainer": "trainer",
    "QATTrainer": "trainer",
    "verify": "verify",
}
__all__ = [
    "QAT",
    "CompressionTrainer",
    "Distillation",
    "DistillationTrainer",
    "Pruning",
    "PruningTrainer",
    "QATTrainer",
    "Recipe",
    "compress",
    "drop_layers",
    "shrink_ffn",
    "verify",
]


def __getattr__(name: str) -> object:
    """Public names load on first use, so that ``import hf_compress`` and ``hf-compress --help`` are quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_compress.{_HOME[name]}"), name)
