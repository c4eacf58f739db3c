"""Cut models reload with stock classes, and cutting what does nothing changes nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compress.errors import CompressError
from hf_compress.surgery import drop_layers, shrink_ffn
from hf_compress.weights import blocks_of
from tests.models import CAUSAL, CONFIGS, MOE, tiny

IDS = torch.arange(3, 19)[None]


def reloaded(model, folder: Path):
    model.save_pretrained(folder)
    auto = (
        AutoModelForSequenceClassification
        if "num_labels" in model.config.to_diff_dict() or model.config.model_type == "bert"
        else AutoModelForCausalLM
    )
    again, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return again.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_dropped_layers_reload_equal_and_generate(name: str, tmp_path: Path) -> None:
    model = tiny(name, **({"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}))
    facts = drop_layers(model, keep=[0, 1, 3])
    assert facts["kept_layers"] == [0, 1, 3]
    again = reloaded(model, tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    if name in CAUSAL:
        assert torch.equal(
            model.generate(IDS, max_new_tokens=4, do_sample=False),
            again.generate(IDS, max_new_tokens=4, do_sample=False),
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_narrower_ffn_reloads_equal(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    shrink_ffn(model, width=0.5)
    torch.testing.assert_close(reloaded(model, tmp_path)(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_cutting_zeroed_channels_changes_nothing() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for block in blocks_of(model):
            block.mlp.down_proj.weight[:, ::2] = 0
    before = model(IDS).logits
    shrink_ffn(model, width=64)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


def test_keeping_everything_changes_nothing() -> None:
    model = tiny("bert")
    before = model(IDS).logits
    shrink_ffn(model, width=128)
    drop_layers(model, keep=2)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("keep", [[1, 0], [0, 0], [0, 9], [], 9])
def test_impossible_layers_are_refused(keep: object) -> None:
    with pytest.raises(CompressError, match="layers"):
        drop_layers(tiny("llama"), keep=keep)


@pytest.mark.parametrize("name", MOE)
def test_expert_width_is_refused_by_name(name: str) -> None:
    with pytest.raises(CompressError, match="mixture-of-experts"):
        shrink_ffn(tiny(name), width=0.5)
