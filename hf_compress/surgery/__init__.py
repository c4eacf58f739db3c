"""Remove parts of a model for real and fix its config, so that stock classes load the result."""

from hf_compress.surgery.ffn import shrink_ffn
from hf_compress.surgery.layers import drop_layers

__all__ = ["drop_layers", "shrink_ffn"]
