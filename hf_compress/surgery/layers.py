"""Drop whole blocks and renumber the ones that stay."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.weights import base_of, blocks_of


def drop_layers(model: PreTrainedModel, *, keep: list[int] | int | float) -> dict[str, Any]:
    """Keep the blocks named in `keep` (indexes), or so many (a share below 1) evenly spaced with the first and the
    last, in place.

    Raises:
        CompressError: an index out of range or twice; a choice the config cannot express (MoE: dense blocks come
        first).
    """
    base, family = base_of(model), family_of(model.config)
    blocks = blocks_of(model)
    count = len(blocks)
    if not isinstance(keep, list):
        number = max(1, round(count * keep)) if isinstance(keep, float) and keep < 1 else int(keep)
        if not 0 < number <= count:
            raise CompressError(f"cannot keep {number} of {count} layers", where="shrink.layers")
        keep = sorted({round(i * (count - 1) / max(1, number - 1)) for i in range(number)})
    if sorted(set(keep)) != keep or not keep or keep[0] < 0 or keep[-1] >= count:
        raise CompressError(f"layers {keep} is not an increasing list of indexes below {count}", where="shrink.layers")
    config = model.config
    if family.experts is not None:
        if getattr(config, "mlp_only_layers", None):
            raise CompressError(
                "mlp_only_layers of this config would have to be renumbered",
                where="shrink.layers",
                next_step="keep all layers",
            )
        dense = getattr(config, "first_k_dense_replace", None)
        if dense is not None:
            config.first_k_dense_replace = sum(
                index < dense for index in keep
            )  # dense blocks come first, and `keep` is increasing
        elif getattr(config, "decoder_sparse_step", 1) != 1:
            raise CompressError(
                "decoder_sparse_step places the experts by layer number",
                where="shrink.layers",
                next_step="keep all layers",
            )
    kept = nn.ModuleList(blocks[index] for index in keep)
    for number, block in enumerate(kept):
        for module in block.modules():
            if "layer_idx" in module.__dict__:  # the attention's slot in the cache
                module.__dict__["layer_idx"] = number
    path = family.blocks.split(".")
    setattr(base.base_model.get_submodule(".".join(path[:-1])), path[-1], kept)
    for name in family.per_layer_fields:
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[index] for index in keep])
    setattr(config, family.num_layers, len(keep))
    return {"kept_layers": keep, "layers": [count, len(keep)]}
