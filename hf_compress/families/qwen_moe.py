"""Qwen mixture-of-experts decoders: stacked experts, dense layers possible, a gated shared expert in Qwen2."""

from hf_compress.families import Experts, Family, add_family

add_family(
    Family(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        ffn="mlp",
        experts=Experts(shared="mlp.shared_expert", shared_gated=True, router=("mlp.gate", "mlp.shared_expert_gate")),
    ),
    summary="Qwen1.5/2-MoE: routed experts and one gated shared expert",
    paper="https://arxiv.org/abs/2407.10671",
)
add_family(
    Family(name="qwen3_moe", model_types=("qwen3_moe",), ffn="mlp", experts=Experts()),
    summary="Qwen3-MoE: routed experts, no shared expert",
    paper="https://arxiv.org/abs/2505.09388",
)
