"""One-shot compression, block by block: each block sees inputs from the already compressed prefix."""

from hf_compress.oneshot.checkpoint import Container, compress_checkpoint, empty_model
from hf_compress.oneshot.engine import OneshotReport, mixed_layers, run_blocks
from hf_compress.oneshot.memory import compress_blocks
from hf_compress.oneshot.pruning import PruneOptions, prune
from hf_compress.oneshot.solvers import Solved, Solver, solvers

__all__ = [
    "Container",
    "OneshotReport",
    "PruneOptions",
    "Solved",
    "Solver",
    "compress_blocks",
    "compress_checkpoint",
    "empty_model",
    "mixed_layers",
    "prune",
    "run_blocks",
    "solvers",
]
