"""bfloat16 only where it multiplies faster, and only of what bears it."""

import pytest
import torch

from hf_compress import precision
from hf_compress.grouped_attention import NAME
from hf_compress.precision import quick_copy
from tests.models import tiny


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)


def test_a_rough_product_is_right_to_the_rounding_of_bfloat16() -> None:
    made = torch.Generator().manual_seed(0)
    left, right = (torch.randn(500, width, generator=made) for width in (24, 40))
    found, exact = precision.rough(left).T @ precision.rough(right), left.T @ right
    assert 1e-5 < (found - exact).norm() / exact.norm() < 5e-3
    assert precision.rough(left.double()).dtype == torch.float64


def test_routed_experts_on_a_cpu_are_not_run_in_bfloat16() -> None:
    assert precision.calibrating(tiny("llama"), "cpu")._enabled
    assert not precision.calibrating(tiny("deepseek_v3"), "cpu")._enabled


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quick_copy_has_short_parameters_and_all_else_as_it_was(name: str) -> None:
    """Rotary frequencies in bfloat16 would move positions; a tied head stays tied."""
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    short = quick_copy(model)
    assert short is not model
    assert (short.config._attn_implementation, model.config._attn_implementation) == (NAME, "sdpa")
    for (key, ours), theirs in zip(short.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16)), key
    for (key, ours), theirs in zip(short.named_buffers(), model.buffers(), strict=True):
        assert ours.dtype == theirs.dtype, key
        assert torch.equal(ours, theirs), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (short, model)]
    assert tied == [name == "gpt2"] * 2
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert (short(ids).logits.float() - model(ids).logits).norm() < 0.05 * model(ids).logits.norm()


def test_what_gains_nothing_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (tiny("deepseek_v3"), tiny("llama", dtype=torch.bfloat16)):
        assert quick_copy(model) is model
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: False)
    model = tiny("llama")
    assert quick_copy(model) is model
