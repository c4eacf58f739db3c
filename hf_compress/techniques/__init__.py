"""What can happen during one training run: distillation, pruning, quantization-aware training; one file each."""

from hf_compress.techniques.base import Step, Technique

__all__ = ["Step", "Technique"]
