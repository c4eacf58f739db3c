"""What shares keys is computed together, and is what transformers computes."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_compress import grouped_attention
from hf_compress.grouped_attention import grouped, use_grouped
from tests.models import tiny


@pytest.mark.parametrize("left", [0, 3], ids=["", "padded"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_heads_that_share_keys_attend_as_they_did(name: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at once, then position by position; only what is one new position without padding is computed by it."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    plain, packed, passed = tiny(name, **heads), tiny(name, **heads), list[int]()
    use_grouped(packed)

    def counted(module: nn.Module, query: torch.Tensor, *args: Any, **others: Any) -> Any:
        passed.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **others)

    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", counted)
    ids = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    found = []
    for model in (plain, packed):
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.5
        with torch.no_grad():
            out = model(ids[:, :10], attention_mask=mask[:, :10])
            steps = [out.logits]
            for at in range(10, 14):
                out = model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=out.past_key_values)
                steps.append(out.logits)
        found.append(torch.cat(steps, 1)[:, left:])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert sorted(set(passed)) == ([1, 10] if left else [10])


def test_what_it_does_not_compute_is_left_to_transformers() -> None:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    bias = torch.randn(1, 1, 1, 5)
    ours, theirs = (
        attend(module, query, key, key, None, scaling=0.5, position_bias=bias)[0]
        for attend in (grouped, sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, grouped(module, query, key, key, None, scaling=0.5)[0], atol=1e-2)
    with pytest.raises(ValueError, match="softcap"):
        grouped(module, query, key, key, None, softcap=30.0)


def test_only_what_attends_by_sdpa_is_changed() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    use_grouped(model)
    assert model.config._attn_implementation == "eager"
