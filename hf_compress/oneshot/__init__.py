"""One-shot compression, block by block: each block sees inputs from the already compressed prefix."""

from hf_compress.oneshot.checkpoint import prune_checkpoint
from hf_compress.oneshot.engine import OneshotReport, run_blocks
from hf_compress.oneshot.prune import prune_blocks

__all__ = ["OneshotReport", "prune_blocks", "prune_checkpoint", "run_blocks"]
