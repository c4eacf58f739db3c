"""Invariants of half-quadratic rounding: every half-step lowers its objective, the result is never worse."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compress import quantize
from hf_compress.backends import backends
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.grids import Grid, fake_quantize, min_max, scales
from hf_compress.oneshot import compress_blocks, prune, solvers
from hf_compress.oneshot.half_quadratic import Half, half_quadratic, in_scales
from hf_compress.weights import weights
from tests.models import tiny

GRIDS = [Grid(3, 16), Grid(4, 16, "uint"), Grid(2, 16, "uint"), Grid(4, 16, "nf4", pinned=True), Grid(4, None, "fp4")]


def outlying() -> Tensor:
    """A matrix whose groups have one weight each that is far from the rest."""
    w = torch.randn(24, 48, generator=torch.Generator().manual_seed(3))
    w[:, ::16] *= 4
    return w


def first(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    return min_max(w, grid) if grid.kind == "uint" else (scales(w, grid), None)


@pytest.mark.parametrize("grid", GRIDS)
def test_each_half_step_lowers_its_objective(grid: Grid) -> None:
    w, p = outlying(), 0.7
    beta = in_scales(10.0, p, grid)
    scale, zero = first(w, grid)
    state = Half.start(w, scale, zero, grid)
    moved = dict.fromkeys(("shrink", "round", "factor", "zero"), 0.0)
    for _ in range(6):
        halves = {
            "shrink": lambda: state.shrink(p, beta),
            "round": lambda: state.round(grid),
            "factor": state.fit_factor,
            "zero": lambda: state.fit_zero(grid) if zero is not None else None,
        }
        for name, half in halves.items():
            before = state.objective(p, beta)
            half()
            after = state.objective(p, beta)
            assert (after <= before + 1e-4 * before.abs() + 1e-5).all(), name
            moved[name] += float((before - after).sum())
    assert moved["shrink"] > 0.1
    assert moved["factor"] > 0.1


def test_shrinking_is_the_best_error_of_one_weight() -> None:
    """By brute force over a fine line of errors."""
    p, beta, x = 0.7, 10.0, torch.linspace(-0.6, 0.6, 25).view(1, 1, -1)
    ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    state = Half(x, torch.zeros_like(x), torch.zeros_like(x), ones, zeros)
    state.shrink(p, beta)
    line = torch.linspace(-0.7, 0.7, 2801)[:, None]
    cost = line.abs().pow(p) + beta / 2 * (line - x.flatten()).square()
    found = state.error.flatten().abs().pow(p) + beta / 2 * (state.error.flatten() - x.flatten()).square()
    torch.testing.assert_close(found, cost.amin(0), rtol=2e-3, atol=2e-4)
    assert (state.error == 0).any()
    assert (state.error != 0).any()


@pytest.mark.parametrize("grid", GRIDS)
def test_no_group_is_worse_than_the_nearest_and_outliers_gain(grid: Grid) -> None:
    w, p = outlying(), 0.7
    scale, zero = first(w, grid)
    found, moved = half_quadratic(w, scale, zero, grid, p=p, beta=10.0, steps=20)
    ours = Half.start(w, found, moved, grid).residual * found[..., None]
    plain = Half.start(w, scale, zero, grid).residual * scale[..., None]
    new, old = ours.abs().pow(p).sum(-1), plain.abs().pow(p).sum(-1)
    assert (new <= old * (1 + 1e-4)).all()
    assert new.sum() < 0.99 * old.sum()
    assert (found > 0).all()
    if moved is not None:
        assert torch.equal(moved, moved.round())


def test_the_largest_weight_stays_at_the_largest_level_whatever_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pinned grid's container finds the scale from it."""
    grid, weight = Grid(4, 16, "nf4", pinned=True), weights(tiny("llama"))[0]
    wide = scales(weight.matrix, grid) * 1.4
    module = import_module("hf_compress.oneshot.solvers.hqq")
    monkeypatch.setattr(module, "half_quadratic", lambda *args, **options: (wide, None))
    (solved,) = solvers["hqq"](grid=grid).solve([weight], Statistics())
    torch.testing.assert_close(scales(solved.values, grid), wide)


@pytest.mark.parametrize("kind", ["int", "uint"])
def test_zeros_stay_zero_and_weights_are_on_the_grid(kind: str) -> None:
    model, grid = tiny("deepseek_v3"), Grid(4, 32, kind)
    prune(model, [], method="criterion", criterion="magnitude", sparsity=0.5, pattern="2:4")
    zeros = {w.name: w.matrix == 0 for w in weights(model)}
    report = compress_blocks(model, [], solvers["hqq"](grid=grid))
    for weight in weights(model):
        assert (weight.matrix[zeros[weight.name]] == 0).all()
        if kind == "int":
            assert torch.equal(fake_quantize(weight.matrix, report.scales[weight.name], grid), weight.matrix)


@pytest.mark.parametrize("solver", ["hqq", "rtn"])
@pytest.mark.parametrize(
    ("backend", "options"),
    [("compressed-tensors", {"group_size": 32}), ("bitsandbytes", {}), ("bitsandbytes", {"double_quant": True})],
)
def test_containers_store_what_it_chose(backend: str, options: dict[str, Any], solver: str, tmp_path: Path) -> None:
    model, plain = tiny("llama"), tiny("llama")
    grid = backends.entry(backend).traits["grid"](bits=4, **options)
    report = compress_blocks(model, [], solvers[solver](grid=grid))
    compress_blocks(plain, [], solvers["rtn"](grid=grid))
    same = [torch.equal(a.matrix, b.matrix) for a, b in zip(weights(model), weights(plain), strict=True)]
    assert all(same) == (solver == "rtn")
    written = quantize(model, tmp_path / "out", backend=backend, bits=4, scales=report.scales, **options)
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(written.model(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_a_power_out_of_range_is_refused() -> None:
    with pytest.raises(CompressError, match="above 0 and up to 1"):
        solvers["hqq"](grid=Grid(4), p=1.5)
