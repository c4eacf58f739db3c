"""Every matrix is seen once, with the right kind and orientation; coverage adds up."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compress.coverage import coverage
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.weights import KINDS, weights
from tests.models import CONFIGS, MOE, tiny


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_is_seen_exactly_once(name: str) -> None:
    model = tiny(name)
    seen = {id(w.whole): w.whole.numel() for w in weights(model, KINDS)}
    assert sum(seen.values()) == sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    assert not [w.name for w in weights(model, ["other"])]
    names = [w.name for w in weights(model, KINDS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", MOE)
def test_stacked_experts_give_one_weight_an_expert(name: str) -> None:
    model = tiny(name)
    experts = weights(model, ["expert"])
    assert {w.expert for w in experts} == {0, 1, 2, 3}
    before = experts[1].whole.clone()
    experts[1].matrix.zero_()
    changed = (experts[1].whole != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]


def test_conv1d_is_given_as_out_in() -> None:
    weight = next(w for w in weights(tiny("gpt2")) if "c_fc" in w.name)
    assert weight.shape == (256, 64)
    assert weight.whole.shape == (64, 256)


def test_tied_head_is_given_once() -> None:
    assert [w.name for w in weights(tiny("llama", tie_word_embeddings=True), ["embedding", "head"])] == [
        "model.embed_tokens.weight"
    ]


def test_names_are_those_of_the_plain_model_inside_peft() -> None:
    from peft import LoraConfig, get_peft_model

    plain = [w.name for w in weights(tiny("llama"))]
    assert [w.name for w in weights(get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear")))] == plain


def test_coverage_counts_experts_apart_and_names_what_is_left() -> None:
    model = tiny("deepseek_v3")
    found = coverage(
        model,
        [w.name for w in weights(model) if w.kind != "expert"],
        {w.name: "stacked" for w in weights(model, ["expert"])},
    )
    assert found.experts == 0.0
    assert 0 < found.share < 1
    assert len(found.skipped["stacked"]) == 8
    with pytest.raises(CompressError, match="stacked"):
        found.require(0.9, where="quantize")
    assert coverage(model, [w.name for w in weights(model)]).share == 1.0


def test_unknown_and_refused_families_say_so() -> None:
    with pytest.raises(CompressError, match="no family describes"):
        family_of(AutoConfig.for_model("opt"))
    for name in ("deepseek_v32", "deepseek_v4"):
        with pytest.raises(CompressError, match="not supported"):
            family_of(AutoConfig.for_model(name))


def test_meta_models_are_walked_without_memory() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", num_hidden_layers=4))
    assert sum(w.shape[0] * w.shape[1] for w in weights(model, ["expert"])) == 3 * 7168 * 2048 * 256
