"""Scripts that run in other environments. They import one another by their plain names, and nothing of hf_compress."""
