"""Llama-shaped decoders: gated FFN, separate q, k, v, o."""

from hf_compress.families import Family, add_family

add_family(
    Family(name="llama", model_types=("llama", "mistral", "qwen2", "qwen3"), ffn="mlp"),
    summary="Llama, SmolLM2, Mistral, Qwen2, Qwen3: dense decoders with a gated FFN",
    paper="https://arxiv.org/abs/2302.13971",
)
