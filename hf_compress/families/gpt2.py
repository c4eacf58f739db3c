"""GPT-2: fused qkv and transposed `Conv1D` matrices."""

from hf_compress.families import Family, add_family

add_family(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        blocks="h",
        attention=(("attn.c_attn",), ("attn.c_proj",)),
        qkv=("attn.c_attn",),
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        width="n_inner",
        num_layers="n_layer",
        per_layer_fields=(),
        residuals=("ln_1", "ln_2"),
        scaled_by=("ln_1", "", "ln_2"),
        ffn="mlp",
    ),
    summary="GPT-2: Conv1D matrices stored (in, out)",
)
