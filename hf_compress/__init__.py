"""hf_compress."""

__version__ = "0.1.0"
