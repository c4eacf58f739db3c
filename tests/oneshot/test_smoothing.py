"""Smoothing changes no answer, does nothing at a = 0, and leaves less to lose to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_compress import quantize
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.grids import Grid
from hf_compress.oneshot import compress_blocks, solvers
from hf_compress.oneshot.smoothing import EXPONENTS, Smooth, awq, folds_of, rounded_error, smooth, smoothquant
from hf_compress.pipeline import compress
from hf_compress.recipe import parse
from hf_compress.weights import blocks_of, weights
from tests.models import CAUSAL, tiny
from tests.oneshot.test_oneshot import batches, record
from tests.oneshot.test_solvers import correlated, matrix
from tests.training import save_reviews, save_tokenizer

IDS = torch.arange(5, 37).reshape(2, 16)
FOLDS = {  # of the last block: norms, values, and up -> down of the dense FFN, the shared and each of four experts
    "llama": 4,
    "qwen2": 4,
    "qwen3": 4,
    "gpt2": 2,
    "qwen2_moe": 3 + 1 + 4,
    "qwen3_moe": 3 + 4,
    "deepseek_v2": 4 + 1 + 4,
    "deepseek_v3": 4 + 1 + 4,
}


def biased(name: str) -> PreTrainedModel:
    """Every norm and bias differs from where it starts."""
    model = tiny(name)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_any_factors_leave_the_answers_as_they_were(name: str) -> None:
    model = biased(name)
    before, kept = logits(model), {w.name: w.matrix.clone() for w in weights(model)}
    for block in range(len(blocks_of(model))):
        folds = folds_of(model, block)
        for fold in folds:
            fold.apply(torch.rand(int(fold.reads.max()) + 1) * 3 + 0.3)
    assert len(folds) == FOLDS[name]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-4 * float(before.abs().max()))
    last = ("o_proj", "c_proj")  # read by nothing, and in some families read from nothing that could be divided
    assert all(not torch.equal(w.matrix, kept[w.name]) for w in weights(model) if not any(x in w.name for x in last))


def test_values_that_several_query_heads_read_are_multiplied_for_each() -> None:
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    before = logits(model)
    (fold,) = [f for f in folds_of(model, 0) if f.readers[0].name.endswith("o_proj.weight")]
    assert len(fold.source[0]) == 32
    fold.apply(torch.rand(32) * 3 + 0.3)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-4 * float(before.abs().max()))


def test_a_model_whose_norms_feed_the_stream_is_refused() -> None:
    with pytest.raises(CompressError, match="the residual stream reads it too"):
        folds_of(tiny("bert"), 0)


def test_no_exponent_is_no_change_and_factors_have_no_drift() -> None:
    size = torch.rand(48) * 10
    assert torch.equal(awq(size, 0.0), torch.ones(48))
    for exponent in EXPONENTS[1:]:
        s = awq(size, exponent)
        torch.testing.assert_close(s.max() * s.min(), torch.tensor(1.0))
        assert (s.argsort() == size.argsort()).all()
    assert torch.equal(awq(torch.zeros(4), 0.7), torch.ones(4))


def test_the_error_is_that_of_the_rounded_layer() -> None:
    w, x, s, grid = matrix(), correlated(), torch.rand(48) + 0.5, Grid(4, 16)
    (weight,) = [w for w in weights(tiny("llama")) if w.name.endswith("0.mlp.down_proj.weight")]
    solved = solvers["rtn"](grid=grid)
    wide = weight.matrix[:, :48] * s
    rounded = _rtn(wide, grid) / s
    expected = ((weight.matrix[:, :48] - rounded) @ x.T).square().sum()
    torch.testing.assert_close(rounded_error(weight.matrix[:, :48], x.T @ x, s, grid), expected, rtol=1e-4, atol=0)
    assert solved.needs == ()
    assert float(rounded_error(w, x.T @ x, torch.ones(48), grid)) > 0


def _rtn(w: torch.Tensor, grid: Grid) -> torch.Tensor:
    grouped = grid.groups(w)
    step = grouped.abs().amax(-1, keepdim=True) / grid.largest
    return ((grouped / step).round() * step).flatten(1)


def test_smoothquant_shares_the_range_as_asked() -> None:
    x, w = torch.rand(32) * 50 + 1, torch.rand(32) + 0.1
    s = smoothquant(x, w, 0.5)
    torch.testing.assert_close(x / s, w * s)
    torch.testing.assert_close(x / smoothquant(x, w, 1.0), torch.ones(32))
    torch.testing.assert_close(w * smoothquant(x, w, 0.0), torch.ones(32))


def test_the_largest_inputs_are_seen() -> None:
    model = tiny("llama")
    read: list[torch.Tensor] = []
    module = model.model.layers[1].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda module, args: read.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        masks = []
        for batch in batches():
            model(**batch)
            masks.append(batch["attention_mask"].flatten().bool())
    hook.remove()
    expected = torch.cat([rows[mask] for rows, mask in zip(read, masks, strict=True)]).abs().amax(0)
    seen: dict[str, Statistics] = record(model, batches(), ("input_max",))
    found = seen["model.layers.1.mlp.down_proj.weight"].input_max
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def outlying(name: str) -> PreTrainedModel:
    """The same answers, with a few channels that are large where they are made and small where they are read."""
    model = biased(name)
    for block in range(len(blocks_of(model))):
        for fold in folds_of(model, block):
            s = torch.ones(int(fold.reads.max()) + 1)
            s[::16] = 0.05
            fold.apply(s)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_awq_loses_less_to_rounding_and_changes_nothing_before(name: str) -> None:
    dense, plain, model = logits(outlying(name)), outlying(name), outlying(name)
    grid = Grid(4, 32)
    facts = smooth(model, batches(), Smooth(), grid)
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-4 * float(dense.abs().max()))
    assert facts["folds"] == sum(len(folds_of(model, block)) for block in range(2))
    assert facts["mean_exponent"] > 0.1
    for each in (plain, model):
        compress_blocks(each, [], solvers["rtn"](grid=grid))
    assert (logits(model) - dense).norm() < 0.8 * (logits(plain) - dense).norm()


def test_the_chosen_exponent_is_never_worse_than_none() -> None:
    model, grid = tiny("llama"), Grid(3, 32)
    name = "model.layers.0.self_attn.k_proj.weight"
    given = record(tiny("llama"), batches(), ("input_norm", "hessian"))
    before = {w.name: w.matrix.clone() for w in weights(model)}
    smooth(model, batches(), Smooth(), grid)
    hessian = given[name].hessian
    assert hessian is not None
    found = {w.name: w.matrix for w in weights(model)}
    qkv = [name.replace("k_proj", other) for other in ("q_proj", "k_proj")]  # values have factors on their rows too
    s = found[name][0] / before[name][0]
    new, old = (
        sum(float(rounded_error(before[n], hessian, each, grid)) for n in [*qkv, name.replace("k_proj", "v_proj")])
        for each in (s, torch.ones_like(s))
    )
    assert new <= old * 1.0001


def test_the_exponent_is_searched_on_a_weights_own_grid() -> None:
    def smoothed(grid: Grid, own: dict[str, Grid]) -> list[torch.Tensor]:
        model = tiny("llama")
        smooth(model, batches(), Smooth(), grid, grids=own)
        return [w.matrix for w in weights(model)]

    own = smoothed(Grid(2, 32), {w.name: Grid(8) for w in weights(tiny("llama"))})
    assert all(map(torch.equal, own, smoothed(Grid(8), {})))
    assert not all(map(torch.equal, own, smoothed(Grid(2, 32), {})))


def test_smoothquant_loses_less_where_activations_are_rounded(tmp_path: Path) -> None:
    dense, plain, model = logits(outlying("llama")), outlying("llama"), outlying("llama")
    smooth(model, batches(), Smooth("smoothquant"), Grid(8))
    options: dict[str, Any] = {"backend": "compressed-tensors", "bits": 8, "activations": 8}
    errors = [
        float((logits(quantize(m, tmp_path / str(i), **options).model) - dense).norm())
        for i, m in enumerate((plain, model))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_a_recipe_smooths_before_it_rounds(tmp_path: Path) -> None:
    tiny("llama", vocab_size=12).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    data = {"id": str(save_reviews(tmp_path / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True}
    how = {"backend": "compressed-tensors", "bits": 4, "group_size": 32, "samples": 16, "smooth": {"method": "awq"}}
    recipe = {"name": "x", "model": {"id": str(tmp_path / "model")}, "data": data, "stages": [{"quantize": how}]}
    result = compress(parse(recipe), tmp_path / "out")
    assert result.facts["stages"][0]["facts"]["smooth"]["folds"] == 8
    for wrong, what in (
        ({"method": "awk"}, "unknown method"),
        ({"method": "smoothquant", "alpha": 2.0}, "not within 0 and 1"),
        ({"method": "awq", "alpha": 0.5}, "awq searches its exponents and reads no alpha"),
    ):
        with pytest.raises(CompressError, match=what):
            parse(recipe | {"stages": [{"quantize": how | {"smooth": wrong}}]})
    with pytest.raises(CompressError, match="smooth needs the whole model in memory"):
        parse(recipe | {"stages": [{"quantize": how | {"streaming": True}}]})
