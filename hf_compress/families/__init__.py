"""What hf_compress must know about an architecture: where its blocks are and which module does what. One file a
family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from hf_compress.errors import CompressError
from hf_compress.registry import Registry


@dataclass(frozen=True)
class Experts:
    """Routed experts of a mixture-of-experts block; names are relative to the block (``mlp.experts``).

    In memory transformers 5 stacks them: `gate_up` (experts, 2 * width, hidden) and `down` (experts, hidden, width).
    On disk each expert has matrices of its own, ``{stored}.{expert}.{name}.weight``, `stored` relative to the
    block, with the names of `stored_gate_up` (its rows in this order) and `stored_down`.
    """

    module: str = "mlp.experts"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    stored: str = "mlp.experts"
    stored_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    stored_down: str = "down_proj"
    router: tuple[str, ...] = ("mlp.gate",)
    shared: str = ""  # the shared experts' MLP, or "" where there is none
    shared_gated: bool = False  # its output is weighted by a gate of its own
    count: str = "num_experts"  # config fields
    active: str = "num_experts_per_tok"


@dataclass(frozen=True)
class Family:
    """One architecture. Module names are relative to a block; config fields are names on the model's config.

    Args:
        name: what ``hf-compress list families`` prints.
        model_types: the `config.model_type` values it serves.
        blocks: the block list, relative to `model.base_model`.
        attention: groups of matrices in the order data flows; the members of one group read the same input.
        qkv: whose outputs are queries, keys and values: three modules, one that holds all three, or the two of latent
            attention (queries; the unrotated keys and the values of each head).
        up, down: the FFN's first matrices (their outputs are the FFN channels) and its last one.
        width: config field holding the number of FFN channels.
        num_layers: config field holding the number of blocks.
        per_layer_fields: config fields that are lists with one entry a block.
        residuals: the modules that read the residual stream before the attention's, and the FFN's, output is added, as
            it is, without a norm or a factor between; "" where there is none.
        scaled_by: for each group of `attention`, then for `up`: the module whose channels it reads, and nothing else
            reads but for routers, so that a channel can be divided there and multiplied here (a norm; the matrix of
            the values); "" where there is none.
        ffn: the FFN, of blocks that compute ``x + attention(norm(x))``, then ``x + ffn(norm(x))``; "" of others.
        experts: routed experts, or None.
        refused: why no work is done on this architecture yet ("" = supported).
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str = "layers"
    attention: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
    )
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    width: str = "intermediate_size"
    num_layers: str = "num_hidden_layers"
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    residuals: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    scaled_by: tuple[str, ...] = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm")
    ffn: str = ""
    experts: Experts | None = None
    refused: str = ""


def expert_options(config: PreTrainedConfig) -> dict[str, str]:
    """Options for from_pretrained and from_config: on a CPU routed experts run `eager`, where that is fastest."""
    found = (entry.value for entry in families if config.model_type in entry.value.model_types)
    routed = any(family.experts is not None for family in found)
    return {"experts_implementation": "eager"} if routed and not torch.cuda.is_available() else {}


families: Registry[Family] = Registry("family", __name__)


def add_family(family: Family, *, summary: str, paper: str = "") -> None:
    """Register `family` under its name; the one line a family file ends with."""
    families.register(family.name, summary=summary, paper=paper)(family)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's config.

    Raises:
        CompressError: the architecture is unknown, or known and refused (says why).
    """
    for entry in families:
        if config.model_type in entry.value.model_types:
            if entry.value.refused:
                raise CompressError(
                    f"{entry.name} models are not supported: {entry.value.refused}",
                    where=f"model_type {config.model_type!r}",
                    next_step="see `hf-compress list families` for what is",
                )
            return entry.value
    known = sorted(t for entry in families if not entry.value.refused for t in entry.value.model_types)
    raise CompressError(
        f"no family describes model_type {config.model_type!r}",
        where="config.json",
        next_step="add one file to hf_compress/families (see CONTRIBUTING.md); known: " + ", ".join(known),
    )
