"""Keys and values in fewer bits: what they take and lose, who can have them, and that stock transformers reads the
setting back from every container."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.stages.cache import Cache, cost, head_widths
from tests.models import CAUSAL, CONFIGS, tiny
from tests.training import WORDS, save_reviews, save_tokenizer

ROWS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}]


@pytest.mark.parametrize("name", CAUSAL)
def test_bytes_are_those_of_the_cache_and_one_scale_for_all_loses_more(name: str) -> None:
    model = tiny(name)
    model.lm_head.weight.data *= 8  # answers that a key can change
    found = {kind: cost(model, BATCHES, Cache(kind).settings(model.config)) for kind in ("int8", "fp8")}
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ROWS[:, :20], past_key_values=plain)
    values = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in plain.layers)
    assert all(each["dense_bytes_per_token"] == 4 * values for each in found.values())
    assert found["fp8"]["bytes_per_token"] == pytest.approx(values, rel=0.01)
    group = 64 if not any(width % 64 for width in head_widths(model.config)) else 32
    scales = 8 * values / group  # a scale and a zero of each group, in float32
    assert found["int8"]["bytes_per_token"] == pytest.approx(values + scales)
    assert 0 < 5 * found["int8"]["kl"] < found["fp8"]["kl"]
    assert found["int8"]["positions"] == 40


def test_the_loss_is_that_of_answers_read_from_the_cache() -> None:
    """By hand, one row and two tokens."""
    model = tiny("llama")
    settings, ids = Cache("fp8").settings(model.config), ROWS[:1, :4]
    cache = QuantizedCache(config=model.config, **settings)
    with torch.no_grad():
        wanted = model(ids).logits[0].log_softmax(-1)
        model(ids[:, :2], past_key_values=cache)
        got = [model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0].log_softmax(-1) for i in (2, 3)]
    kl = [(wanted[i].exp() * (wanted[i] - answer)).sum() for i, answer in zip((2, 3), got, strict=True)]
    made = cost(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], settings)
    assert made["kl"] == pytest.approx(float(sum(kl)) / 2, rel=1e-4)


def test_rows_are_cut_to_the_shortest_and_must_hold_something() -> None:
    model, mask = tiny("llama"), torch.ones_like(ROWS)
    mask[1, 12:] = 0
    settings = Cache("fp8").settings(model.config)
    padded = cost(model.train(), [{"input_ids": ROWS, "attention_mask": mask}], settings)
    cut = cost(model, [{"input_ids": ROWS[:, :12], "attention_mask": mask[:, :12]}], settings)
    assert padded == cut
    assert model.training
    mask[1, 3:] = 0
    with pytest.raises(CompressError, match="nothing to read from a cache"):
        cost(model, [{"input_ids": ROWS, "attention_mask": mask}], settings)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    tiny("deepseek_v3", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    data = {"id": str(save_reviews(tmp_path / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True}
    return {"name": "x", "model": {"id": str(tmp_path / "model")}, "data": data}


NF4 = {"backend": "bitsandbytes", "bits": 4, "min_coverage": 0.0}
PACKED = {"backend": "compressed-tensors", "bits": 4, "group_size": 32}
TRAIN = {"train": {"args": {"max_steps": 1, "disable_tqdm": True}}}
AFTER = {
    "nf4": ("int8", [{"quantize": NF4}]),
    "streamed": ("int8", [{"quantize": PACKED | {"streaming": True}}]),
    "trained": ("fp8", [TRAIN, {"quantize": PACKED}]),
}


@pytest.mark.parametrize(("kind", "after"), AFTER.values(), ids=AFTER)
def test_stock_transformers_generates_with_it(
    recipe: dict[str, Any], kind: str, after: list[Any], tmp_path: Path
) -> None:
    result = compress(parse(recipe | {"stages": [{"cache": {"kind": kind, "recent": 4}}, *after]}), tmp_path / "out")
    facts = result.facts["stages"][0]["facts"]
    assert facts["kind"] == kind
    assert facts["bytes_per_token"] < 0.4 * facts["dense_bytes_per_token"]
    assert f"  - generate() keeps keys and values in {kind}, " in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, return_dict_in_generate=True)
    assert type(made.past_key_values) is QuantizedCache


SLIDING = CONFIGS["qwen2"] | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
NARROW = CONFIGS["llama"] | {"model_type": "llama", "head_dim": 20}


@pytest.mark.parametrize(
    ("config", "kind", "says"),
    [
        (CONFIGS["bert"] | {"model_type": "bert"}, "fp8", "go on with a text"),
        (SLIDING | {"max_window_layers": 1}, "fp8", "full attention"),
        (NARROW, "int8", "heads of 20 values"),
        (NARROW, "fp8", ""),
    ],
)
def test_the_plan_foresees_models_without_such_a_cache(
    recipe: dict[str, Any], config: dict[str, Any], kind: str, says: str
) -> None:
    task = "text-classification" if config["model_type"] == "bert" else "causal-lm"
    model = {"config": config, "tokenizer": recipe["model"]["id"], "task": task}
    rows = plan(parse(recipe | {"model": model, "stages": [{"cache": {"kind": kind}}]}))
    refused = [note for row in rows for note in row.notes if "REFUSED" in note]
    assert bool(refused) == bool(says)
    assert all(says in note for note in refused)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"cache": {"kind": "int7"}}], r"unknown kind 'int7'[\s\S]*stages\[0\].cache.kind"),
        ([{"cache": {"recent": 0}}], r"no number of tokens[\s\S]*cache.recent"),
        ([{"quantize": PACKED}, {"cache": {}}], "put cache before quantize"),
    ],
)
def test_what_cannot_be_kept_is_named(recipe: dict[str, Any], stages: list[Any], says: str) -> None:
    with pytest.raises(CompressError, match=says):
        parse(recipe | {"stages": stages})


def test_a_missing_package_is_named_before_any_work(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "hqq" else object())
    parse(recipe | {"stages": [{"cache": {"kind": "fp8"}}]})
    with pytest.raises(CompressError, match=r"'hqq'[\s\S]*pip install 'hf-compress\[cache\]'"):
        parse(recipe | {"stages": [{"cache": {}}]})
