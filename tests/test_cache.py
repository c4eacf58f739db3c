"""Keys and values in 8 bits: what they take and lose, who can have them, and that stock transformers reads the
setting back from every container."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache

from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.stages.cache import Cache, cost
from tests.models import CAUSAL, CONFIGS, tiny
from tests.training import WORDS, decoder_recipe

ROWS = list(torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0)))


def settings(model: PreTrainedModel) -> dict[str, Any]:
    return Cache().settings(model.config)


@pytest.mark.parametrize("name", CAUSAL)
def test_bytes_are_those_of_the_cache_and_little_is_lost(name: str) -> None:
    model = tiny(name)
    found = cost(model, ROWS, settings(model))
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ROWS[0][None, :20], past_key_values=plain)
    values = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in plain.layers)
    assert found["dense_bytes_per_token"] == 4 * values
    scales = 8 * values / settings(model)["q_group_size"]  # a scale and a zero of each group, in float32
    assert found["bytes_per_token"] == pytest.approx(values + scales)
    assert 0 < found["kl"] < 1e-3
    assert found["positions"] == 40


def test_the_loss_is_that_of_answers_read_from_the_cache() -> None:
    """By hand, one row and two tokens."""
    model, ids = tiny("llama"), ROWS[0][None, :4]
    coarse = settings(model) | {"nbits": 4}  # of an even number of tokens
    cache = QuantizedCache(config=model.config, **coarse)
    with torch.no_grad():
        wanted = model(ids).logits[0].log_softmax(-1)
        model(ids[:, :2], past_key_values=cache)
        got = [model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0].log_softmax(-1) for i in (2, 3)]
    kl = [(wanted[i].exp() * (wanted[i] - answer)).sum() for i, answer in zip((2, 3), got, strict=True)]
    assert cost(model, [ids[0]], coarse)["kl"] == pytest.approx(float(sum(kl)) / 2, rel=1e-4)


def test_rows_that_say_nothing_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").train()
    short = [ROWS[0][:3], ROWS[0][:0]]
    assert cost(model, [*short, ROWS[1]], settings(model)) == cost(model, ROWS[1:], settings(model))
    assert model.training
    monkeypatch.setattr("hf_compress.stages.cache.LONGEST", 12)
    assert cost(model, ROWS, settings(model))["positions"] == 12
    with pytest.raises(CompressError, match="no row of text has four tokens"):
        cost(model, short, settings(model))


def test_answers_that_are_not_finite_are_no_figure() -> None:
    model = tiny("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CompressError, match="not finite"):
        cost(model, ROWS, settings(model))


def test_groups_divide_whatever_mla_caches() -> None:
    """transformers caches its latent and its rotary part, or keys and values of every head."""
    model = tiny("deepseek_v3", qk_nope_head_dim=48, qk_rope_head_dim=16, head_dim=16, kv_lora_rank=64, v_head_dim=64)
    assert Cache().settings(model.config)["q_group_size"] == 16
    model.generation_config.cache_implementation, model.generation_config.cache_config = "quantized", settings(model)
    for length in (1, 3):
        model.generate(ROWS[0][None, :length], max_new_tokens=3)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return decoder_recipe(tmp_path, "deepseek_v3")


NF4 = {"backend": "bitsandbytes", "bits": 4, "min_coverage": 0.0}
PACKED = {"backend": "compressed-tensors", "bits": 4, "group_size": 32}
AFTER = {"nf4": NF4, "streamed": PACKED | {"streaming": True}}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_stock_transformers_generates_with_it(recipe: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("deepseek_v3", vocab_size=len(WORDS), use_cache=False)  # as training with checkpointing leaves it
    model.save_pretrained(tmp_path / "model")
    recipe["stages"] = [{"cache": {"recent": 4}}, {"quantize": after}]
    facts = compress(parse(recipe), tmp_path / "out").facts["stages"][0]["facts"]
    assert facts["bytes_per_token"] < 0.4 * facts["dense_bytes_per_token"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "  - generate() keeps keys and values of the prompt in int8, and later ones once 4 have come: " in card
    assert "transformers hqq" in card.replace("bitsandbytes ", "").replace("compressed-tensors ", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, return_dict_in_generate=True)
    assert type(made.past_key_values) is QuantizedCache


SLIDING = CONFIGS["qwen2"] | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
PLAIN = CONFIGS["llama"] | {"model_type": "llama"}
NARROW = CONFIGS["llama"] | {"model_type": "llama", "head_dim": 20}


@pytest.mark.parametrize(
    ("config", "stages", "says"),
    [
        (CONFIGS["bert"] | {"model_type": "bert"}, [], "only causal language models keep"),
        (SLIDING | {"max_window_layers": 1}, [], "full attention"),
        (NARROW, [], "heads of 20 values"),
        (PLAIN, [{"quantize": {"backend": "gptq", "bits": 4}}], "environment gptq has no hqq"),
        (PLAIN, [{"export": {"format": "openvino"}}], "environment openvino has no hqq"),
        (PLAIN, [{"quantize": PACKED}], ""),
    ],
)
def test_the_plan_foresees_who_has_no_such_cache(
    recipe: dict[str, Any], config: dict[str, Any], stages: list[Any], says: str
) -> None:
    task = "text-classification" if config["model_type"] == "bert" else "causal-lm"
    model = {"config": config, "tokenizer": recipe["model"]["id"], "task": task}
    rows = plan(parse(recipe | {"model": model, "stages": [{"cache": {}}, *stages]}))
    refused = [note for row in rows for note in row.notes if "REFUSED" in note]
    assert any(says in note for note in refused) if says else not refused


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"cache": {"recent": 0}}], r"no number of tokens[\s\S]*cache.recent"),
        ([{"quantize": PACKED}, {"cache": {}}], "put cache before quantize"),
        ([{"cache": {}}, {"shrink": {"layers": 1}}], "put cache last"),
        ([{"cache": {}}, {"prune": {"sparsity": 0.5}}], "put cache last"),
        ([{"cache": {}}, {"train": {}}], "put cache last"),
        ([{"cache": {}}, {"cache": {}}], "a cache stage already"),
    ],
)
def test_what_cannot_be_kept_is_named(recipe: dict[str, Any], stages: list[Any], says: str) -> None:
    with pytest.raises(CompressError, match=says):
        parse(recipe | {"stages": stages})


def test_a_missing_package_is_named_before_any_work(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "hqq" else object())
    with pytest.raises(CompressError, match=r"'hqq'[\s\S]*pip install 'hf-compress\[cache\]'"):
        parse(recipe | {"stages": [{"cache": {}}]})
