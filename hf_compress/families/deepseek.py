"""DeepSeek-V2 and V3: multi-head latent attention (MLA) and routed plus shared experts."""

from hf_compress.families import Experts, Family, add_family

_mla = (
    (
        "self_attn.q_proj",
        "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
    ),  # q_proj only where q_lora_rank is None
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),  # reads (batch, 1, tokens, rank)
    ("self_attn.o_proj",),
)
_qkv = ("self_attn.q_b_proj", "self_attn.kv_b_proj")  # q_proj where q_lora_rank is None
_scaled_by = (
    *("input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    *("", "post_attention_layernorm"),  # o_proj: kv_b_proj makes keys and values in turn
)
_experts = Experts(shared="mlp.shared_experts", count="n_routed_experts")

add_family(
    Family(
        name="deepseek_v2",
        model_types=("deepseek_v2",),
        attention=_mla,
        qkv=_qkv,
        scaled_by=_scaled_by,
        ffn="mlp",
        experts=_experts,
    ),
    summary="DeepSeek-V2 and V2-Lite: MLA, softmax router",
    paper="https://arxiv.org/abs/2405.04434",
)
add_family(
    Family(
        name="deepseek_v3",
        model_types=("deepseek_v3",),
        attention=_mla,
        qkv=_qkv,
        scaled_by=_scaled_by,
        ffn="mlp",
        experts=_experts,
    ),
    summary="DeepSeek-V3 and R1: MLA, sigmoid router with correction bias, FP8 sources",
    paper="https://arxiv.org/abs/2412.19437",
)
add_family(
    Family(
        name="deepseek_v32",
        model_types=("deepseek_v32",),
        attention=_mla,
        experts=_experts,
        refused="its sparse-attention indexer reads the same latents as MLA and no test here covers it",
    ),
    summary="DeepSeek-V3.2: refused (sparse-attention indexer)",
)
add_family(
    Family(
        name="deepseek_v4",
        model_types=("deepseek_v4",),
        refused="its compressed attention and hyper-connections are not described by a family yet",
    ),
    summary="DeepSeek-V4: refused (compressed attention, hyper-connections)",
)
