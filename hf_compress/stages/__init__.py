"""The stages a recipe is made of: each takes the model as it stands, changes one thing, and says what it did."""

from __future__ import annotations

from hf_compress.stages.base import Done, Stage, Work
from hf_compress.stages.cache import Cache
from hf_compress.stages.export import Export
from hf_compress.stages.prune import Prune
from hf_compress.stages.quantize import Quantize
from hf_compress.stages.shrink import Shrink
from hf_compress.stages.train import Train

STAGES: dict[str, type[Stage]] = {
    "shrink": Shrink,
    "prune": Prune,
    "train": Train,
    "cache": Cache,
    "quantize": Quantize,
    "export": Export,
}

__all__ = ["STAGES", "Cache", "Done", "Export", "Prune", "Quantize", "Shrink", "Stage", "Train", "Work"]
