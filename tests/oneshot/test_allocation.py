"""Bits under a budget: the budget holds, uniform bits are never better, more budget is never worse."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_compress.errors import CompressError
from hf_compress.grids import Grid
from hf_compress.oneshot import allocation, sensitivity
from hf_compress.oneshot.allocation import allocate, uniform
from hf_compress.oneshot.sensitivity import EXPERTS, parts_of, sensitivities
from hf_compress.pipeline import compress
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.weights import weights
from tests.models import tiny
from tests.oneshot.test_oneshot import batches
from tests.training import save_reviews, save_tokenizer

BITS = (2, 3, 4, 8)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    losses, sizes = {}, {}
    for part in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 50))
        losses[str(part)] = {b: draw(st.floats(0, 10)) for b in BITS}  # more bits may look worse: it is measured
        sizes[str(part)] = {b: float(b * count + 3) for b in BITS}
    return losses, sizes


def total(table: dict[str, dict[int, float]], choice: dict[str, int]) -> float:
    return sum(table[part][bits] for part, bits in choice.items())


@pytest.mark.parametrize("slots", [20_000, 7])
@settings(deadline=None, max_examples=30)
@given(made=tables(), share=st.floats(0, 1.2))
def test_the_budget_holds_and_nothing_known_is_better(slots: int, made: Any, share: float) -> None:
    losses, sizes = made
    low, high = (sum(pick(each.values()) for each in sizes.values()) for pick in (min, max))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "SLOTS", slots)
        budgets = sorted({low, low + share * (high - low), high})
        found = [allocate(losses, sizes, budget) for budget in budgets]
    for budget, choice in zip(budgets, found, strict=True):
        assert total(sizes, choice) <= budget
        assert all(total(losses, choice) <= total(losses, other) + 1e-9 for other in uniform(sizes, budget))
        if slots > 7:  # every choice by brute force
            every = (dict(zip(sizes, bits, strict=True)) for bits in product(BITS, repeat=len(sizes)))
            best = min(total(losses, c) for c in every if total(sizes, c) <= budget)
            assert total(losses, choice) == pytest.approx(best)
    reached = [total(losses, choice) for choice in found]
    assert all(after <= before + 1e-9 for before, after in pairwise(reached))


def test_uniform_bits_win_where_slots_are_too_coarse_to_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "SLOTS", 2)
    sizes = {"a": {2: 20.0, 4: 30.0}, "b": {2: 20.0, 4: 31.0}}  # 21 above the least, in slots of 11: one each, not two
    assert allocate({"a": {2: 1.0, 4: 0.0}, "b": {2: 1.0, 4: 0.0}}, sizes, 61.0) == {"a": 4, "b": 4}


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(CompressError, match="below the least that all parts need, 20"):
        allocate({"a": {2: 1.0}}, {"a": {2: 20.0}}, 19.9)


def test_parts_are_what_servers_fuse_and_all_experts() -> None:
    found = parts_of(tiny("deepseek_v3"))
    assert len(found[EXPERTS]) == 8
    assert sorted(w.name for members in found.values() for w in members) == sorted(
        w.name for w in weights(tiny("deepseek_v3"))
    )
    gate_up = next(m for name, m in found.items() if name.endswith("layers.0.mlp.gate_proj.weight"))
    assert [w.module_name.rpartition(".")[2] for w in gate_up] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_table_is_the_divergence_of_one_part_alone(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = dict(list(parts_of(model).items())[:2])
    grids = {bits: Grid(bits, 32) for bits in (2, 4, 8)}
    table = sensitivities(model, batches(), parts, grids, cache=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for each in table.values():
        assert each[2] > 4 * each[4] > 16 * each[8] > 0
    part, members = next(iter(parts.items()))
    with torch.no_grad():
        dense = [model(**batch).logits.log_softmax(-1) for batch in batches()]
        for weight in members:
            grouped = weight.matrix.unflatten(1, (-1, 32))
            step = grouped.abs().amax(-1, keepdim=True) / 7
            weight.matrix.copy_(((grouped / step).round() * step).flatten(1))
        sums, tokens = 0.0, 0
        for batch, wanted in zip(batches(), dense, strict=True):
            found = model(**batch).logits.log_softmax(-1)
            kl = (wanted.exp() * (wanted - found)).sum(-1)
            kl = kl[batch["attention_mask"].bool()] if name == "llama" else kl
            sums, tokens = sums + float(kl.sum()), tokens + kl.numel()
    assert table[part][4] == pytest.approx(sums / tokens, rel=1e-3)


def test_a_table_is_measured_once_for_all_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, grids = tiny("llama"), {2: Grid(2, 32)}
    parts = dict(list(parts_of(model).items())[:1])
    first = sensitivities(model, batches(), parts, grids, cache=tmp_path)
    answers = sensitivity._answers
    monkeypatch.setattr(sensitivity, "_answers", lambda *args: pytest.fail("measured again"))
    assert sensitivities(model, batches(), parts, grids, cache=tmp_path) == first
    monkeypatch.setattr(sensitivity, "_answers", answers)
    weights(model)[0].matrix[0, 0] += 1
    assert sensitivities(model, batches(), parts, grids, cache=tmp_path) != first


def test_answers_that_are_not_finite_have_no_table() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(CompressError, match="answers are not finite"):
        sensitivities(model, batches(), parts_of(model), {2: Grid(2, 32)})


def recipe(root: Path, **options: Any) -> dict[str, Any]:
    if not (root / "model").exists():
        tiny("llama", vocab_size=12).save_pretrained(root / "model")
        save_tokenizer(root / "model")
    data = {"id": str(save_reviews(root / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True}
    how = {"backend": "compressed-tensors", "bits": 6, "group_size": 32, "samples": 8} | options
    return {"name": "x", "model": {"id": str(root / "model")}, "data": data, "stages": [{"quantize": how}]}


def test_a_recipe_meets_its_budget_in_stored_bits(tmp_path: Path) -> None:
    made = recipe(tmp_path, budget=4.2, overrides={"layers.0.self_attn.q_proj": {"bits": 8}})
    (row,) = plan(parse(made))[1:]
    assert "bits a weight: at most 4.20, scales included" in row.notes
    result = compress(parse(made), tmp_path / "out")
    stored = load_file(result.folder / "model.safetensors")
    size = 8 * sum(t.nbytes for key, t in stored.items() if key.endswith(("_packed", "_scale")))
    average = size / sum(w.shape[0] * w.shape[1] for w in weights(tiny("llama")))
    facts = result.facts["stages"][0]["facts"]["allocation"]
    assert average == pytest.approx(facts["average_bits"])
    assert 4.0 < average <= 4.2
    assert len(set(facts["bits"].values())) > 1
    card = (result.folder / "README.md").read_text()
    assert f"chosen under the budget, {average:.2f} bits a weight with scales: 2 bits for " in card
    assert "dequantize=True does not know" in card.partition("## Limits")[2]
    shape = stored["model.layers.0.self_attn.q_proj.weight_packed"].shape
    assert shape[1] == 64 * 8 // 32


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"backend": "bitsandbytes", "bits": 8, "group_size": None}, "one scheme for a whole model"),
        ({"streaming": True}, "the whole model in memory"),
        ({"bits": 8, "group_size": None, "options": {"activations": 8}}, "all weights have 8 bits"),
    ],
)
def test_what_has_no_budget_is_refused_from_the_recipe_alone(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=what):
        parse(recipe(tmp_path, budget=4.0, **options))


def test_a_budget_that_cannot_be_met_stops_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="below the least"):
        plan(parse(recipe(tmp_path, budget=2.0)))


def test_a_part_that_could_not_be_judged_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, answers, calls = tiny("deepseek_v3"), sensitivity._answers, []
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def failing(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > len(batches()):
            raise CompressError("not finite")
        return answers(*args)

    monkeypatch.setattr(sensitivity, "_answers", failing)
    with pytest.raises(CompressError, match="not finite"):
        sensitivities(model, batches(), {EXPERTS: parts_of(model)[EXPERTS]}, {2: Grid(2, 32)})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_budget_alone_calibrates_nothing_and_says_what_it_read(tmp_path: Path) -> None:
    made = recipe(tmp_path, budget=4.2, samples=20)
    facts = compress(parse(made), tmp_path / "out").facts["stages"][0]["facts"]
    assert "calibration_tokens" not in facts
    assert facts["allocation"]["tokens"] == 8 * 16
    notes = plan(parse(recipe(tmp_path, budget=4.2, continuations=1)))[1].notes
    assert any("REFUSED: continuations are text" in note for note in notes)
    (row,) = plan(parse({key: value for key, value in made.items() if key != "data"}))[1:]
    assert any("it reads text, and the recipe has no data" in note for note in row.notes)
