"""Tiny models of every family with the dimensions the containers need (rows % 32 == 0, columns % 64 == 0)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

_decoder: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_moe: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_mla: dict[str, Any] = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "qwen2_moe": _decoder | _moe | {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _decoder | _moe | {"num_experts": 4},
    "deepseek_v2": _decoder | _moe | _mla,
    "deepseek_v3": _decoder | _moe | _mla,
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bert": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "num_labels": 2,
    },
}
CAUSAL = tuple(name for name in CONFIGS if name != "bert")
MOE = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def tiny(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A randomly initialised model of a family, weights of a size that makes logits differ visibly (std 0.2)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(CONFIGS[name] | {"initializer_range": 0.2} | changes))
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model = auto.from_config(config, experts_implementation="eager") if name in MOE else auto.from_config(config)
    return model.eval()
