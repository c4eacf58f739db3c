"""Weights with bits of their own: named by expression, rounded, stored, and opened by plain transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_compress import quantize
from hf_compress.backends import backends
from hf_compress.backends.compressed_tensors import MIXED
from hf_compress.errors import CompressError
from hf_compress.grids import Grid, fake_quantize, scales
from hf_compress.oneshot import compress_blocks, compress_checkpoint, empty_model, solvers
from hf_compress.oneshot.mixed import given_grids
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.verification import verify
from hf_compress.weights import weights
from tests.models import CONFIGS, tiny
from tests.oneshot.test_oneshot import batches

IDS = torch.arange(5, 21)[None]
BASE = {"bits": 4, "group_size": 32}
OVERRIDES: dict[str, dict[str, dict[str, int | None]]] = {
    "llama": {r"layers\.0\..*down": {"bits": 8, "group_size": None}, "down": {"bits": 3}, "q_proj": {"bits": 8}},
    "deepseek_v3": {r"mlp\.experts": {"bits": 3}, r"kv_b_proj|shared_experts": {"bits": 8, "group_size": 64}},
    "qwen3_moe": {r"self_attn": {"bits": 6}},
}


def grids_of(name: str) -> dict[str, Grid]:
    return given_grids([w.name for w in weights(tiny(name))], OVERRIDES[name], Grid(4, 32))


def test_the_first_expression_that_finds_a_weight_decides() -> None:
    found = grids_of("llama")
    assert found["model.layers.0.mlp.down_proj.weight"] == Grid(8)
    assert found["model.layers.1.mlp.down_proj.weight"] == Grid(3, 32)
    assert found["model.layers.1.self_attn.q_proj.weight"] == Grid(8, 32)
    assert len(found) == 4
    with pytest.raises(CompressError, match="no weight matches") as error:
        given_grids([w.name for w in weights(tiny("llama"))], {"dwon_proj": {"bits": 8}}, Grid(4))
    assert "down_proj" in error.value.next_step


def test_what_was_rounded_is_stored_streamed_and_opened_in_a_fresh_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in OVERRIDES:
        own, model, plain = grids_of(name), tiny(name), tiny(name)
        plain.save_pretrained(tmp_path / f"{name}-source")
        solver = solvers["rtn"](grid=Grid(4, 32), grids=own)
        report = compress_blocks(model, [], solver)
        for weight, before in zip(weights(model), weights(plain), strict=True):
            grid = own.get(weight.name, Grid(4, 32))
            assert torch.equal(weight.matrix, fake_quantize(before.matrix, scales(before.matrix, grid), grid))
        options = {"backend": "compressed-tensors", "grids": own} | BASE
        written = quantize(model, tmp_path / name, scales=report.scales, **options)
        with torch.no_grad():
            torch.testing.assert_close(written.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
        packing = backends.entry("compressed-tensors").traits["packing"](
            empty_model(tmp_path / f"{name}-source"), grids=own, **BASE
        )
        compress_checkpoint(tmp_path / f"{name}-source", tmp_path / f"{name}-streamed", [], solver, container=packing)
        one, two = (
            {k: v for f in (tmp_path / place).glob("*.safetensors") for k, v in load_file(f).items()}
            for place in (name, f"{name}-streamed")
        )
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert "Could not match" not in caplog.text
    found = verify(*(tmp_path / name for name in OVERRIDES))
    assert all(facts["logits_difference"] < 1e-5 for facts in found.values())


@pytest.mark.parametrize("solver", [entry.name for entry in solvers if entry.traits["makes"] == "codes"])
def test_every_solver_meets_the_grids_it_is_given(solver: str, tmp_path: Path) -> None:
    own, model = grids_of("llama"), tiny("llama")
    report = compress_blocks(model, batches(), solvers[solver](grid=Grid(4, 32), grids=own))
    written = quantize(model, tmp_path / "out", backend="compressed-tensors", grids=own, scales=report.scales, **BASE)
    with torch.no_grad():
        torch.testing.assert_close(written.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def stage(name: str, root: Path, **options: Any) -> Mapping[str, Any]:
    model = {"config": CONFIGS[name] | {"model_type": name, "dtype": "float32"}}
    model |= {"task": "causal-lm"}
    return {"name": "x", "model": model, "stages": [{"quantize": {"backend": "compressed-tensors"} | BASE | options}]}


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_plan_says_how_many_bits_that_is(name: str, tmp_path: Path) -> None:
    written = quantize(tiny(name), tmp_path / "out", backend="compressed-tensors", grids=grids_of(name), **BASE)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    size = sum(t.nbytes for key, t in stored.items() if key.endswith(("_packed", "_scale")))
    count = sum(w.shape[0] * w.shape[1] for w in weights(tiny(name)))
    (row,) = plan(parse(dict(stage(name, tmp_path, overrides=OVERRIDES[name]))))[1:]
    assert MIXED in row.notes
    assert f"bits a weight: {8 * size / count:.2f}, scales included" in row.notes
    assert not any("REFUSED" in note for note in row.notes)
    assert written.coverage.share == 1.0
    (plain,) = plan(parse(dict(stage(name, tmp_path, group_size=32))))[1:]
    said = (
        f"bits a weight: {BASE['bits'] + 1:.2f}, 1.00 of them scales in float32 (model.dtype: bfloat16 halves those)"
    )
    assert said in plain.notes


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"backend": "bitsandbytes", "bits": 8, "group_size": None}, "overrides", "one scheme for a whole model"),
        ({"overrides": {"down": {"bit": 8}}}, "overrides: 'down'", "unknown key 'bit'"),
        ({"overrides": {"down": {}}}, "overrides: 'down'", "nothing is overridden"),
        ({"overrides": {"down": {"bits": 9}}}, "overrides: 'down': bits", "2 to 8 bits"),
        ({"overrides": {"down": {"bits": None}}}, "overrides: 'down'", "bits is a number"),
        ({"overrides": {"down": {"group_size": 0}}}, "overrides: 'down'", "not positive"),
    ],
)
def test_what_cannot_be_is_refused_from_the_recipe_alone(
    options: dict[str, Any], where: str, what: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=what) as error:
        parse(dict(stage("llama", tmp_path, **({"overrides": {"down": {"bits": 8}}} | options))))
    assert where in error.value.where


def test_an_expression_that_finds_nothing_stops_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no weight matches 'dwon_proj'"):
        plan(parse(dict(stage("llama", tmp_path, overrides={"dwon_proj": {"bits": 8}}))))


def test_experts_on_more_than_one_grid_are_refused(tmp_path: Path) -> None:
    (row,) = plan(parse(dict(stage("qwen3_moe", tmp_path, overrides={r"experts\.down": {"bits": 8}}))))[1:]
    assert any("REFUSED" in note and "more than one number of bits" in note for note in row.notes)
