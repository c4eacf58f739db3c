"""Invariants of second-order rounding (GPTQ, QuantEase): pure functions first, then what a model must keep."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_compress import quantize
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.grids import Grid, codes, fake_quantize, from_codes, pinned, scales, searched_scales
from hf_compress.oneshot import compress_blocks, prune, rounding, solvers
from hf_compress.oneshot.problem import Problem, Target, problem
from hf_compress.oneshot.rounding import coordinate_descent, obs_round, refit_scales, steps
from hf_compress.weights import weights
from tests.models import tiny
from tests.oneshot.test_oneshot import batches
from tests.oneshot.test_solvers import correlated, matrix

GRIDS = [Grid(4, 16), Grid(3, 8), Grid(4, 16, "nf4"), Grid(4, None, "powers"), Grid(2, 16)]


def hessian(x: Tensor) -> Statistics:
    return Statistics(tokens=len(x), hessian=x.T @ x)


def undamped(w: Tensor, x: Tensor) -> Problem:
    return problem(w, hessian(x), Target(damping=0.0))


def free(w: Tensor) -> Tensor:
    return torch.full_like(w, torch.nan)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_squared_errors_of_the_loop_are_the_layers_error(grid: Grid, act_order: bool) -> None:
    w, x = matrix().double(), correlated().double()
    given = undamped(w.float(), x.float())
    given = Problem(given.gram.double(), given.right.double(), given.norm.double())
    scale = scales(w.float(), grid)
    step = steps(given, scale).double()
    levels, loss = obs_round(w * given.norm, given.gram, step, grid, free(w), act_order=act_order)
    error = w - levels * step / given.norm
    expected = (error @ (x.T @ x) * error).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_independent_inputs_are_rounded_to_the_nearest(grid: Grid) -> None:
    w = matrix()
    given = problem(w, Statistics(hessian=torch.diag(torch.rand(48) + 0.1)), Target(damping=0.0))
    scale = scales(w, grid)
    levels, _ = obs_round(w * given.norm, given.gram, steps(given, scale), grid, free(w))
    off = levels != codes(w, scale, grid)
    assert off.float().mean() < 0.005  # a weight half-way between two levels may fall to either side of the scaling


def test_the_size_of_a_column_block_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, grid = matrix(), correlated(), Grid(4, 16)
    given = undamped(w, x)
    found = []
    for columns in (5, 16, 48):
        monkeypatch.setattr("hf_compress.oneshot.rounding.COLUMNS", columns)
        step = steps(given, scales(w, grid))
        levels, _ = obs_round(w * given.norm, given.gram, step, grid, free(w))
        found.append((levels, coordinate_descent(given, levels, step, grid, free(w))))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))
    assert not torch.equal(*found[0])


def layer_error(w: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((w - rounded) @ x.T).square().sum())


def test_feedback_beats_the_nearest_and_order_and_search_help() -> None:
    w, x, grid = matrix(64, 96), correlated(1000, 96), Grid(4, 32)
    x = x / x.std(0).sqrt()  # inputs of sizes 1:7; at 1:50 the small ones cannot make up for the large within the grid
    given, plain = undamped(w, x), scales(w, grid)

    def looped(scale: Tensor, act_order: bool) -> float:
        step = steps(given, scale)
        levels, _ = obs_round(w * given.norm, given.gram, step, grid, free(w), act_order=act_order)
        return layer_error(w, levels * step / given.norm, x)

    nearest = layer_error(w, fake_quantize(w, plain, grid), x)
    assert looped(plain, False) < 0.7 * nearest
    assert looped(plain, True) < looped(plain, False)
    assert looped(searched_scales(w, grid, given.norm.square()), True) < looped(plain, True)


def test_descent_never_rises_stays_on_the_grid_and_ends() -> None:
    w, x, grid = matrix(), correlated(), Grid(3, 16)
    given, scale = undamped(w, x), scales(w, grid)
    step = steps(given, scale)
    levels, losses = codes(w, scale, grid), []
    for _ in range(30):
        losses.append(float(given.loss(levels * step)))
        after = coordinate_descent(given, levels, step, grid, free(w))
        if torch.equal(after, levels):
            break
        levels = after
    else:
        pytest.fail("no fixed point after 30 passes")
    assert len(losses) > 2
    assert all(b <= a + 1e-3 * abs(a) for a, b in pairwise(losses))
    assert set(levels.unique().tolist()) <= set(grid.levels())


def test_one_step_of_descent_is_the_best_level_of_one_weight() -> None:
    """By brute force over the levels of the last column, the others as they are."""
    w, x, grid = matrix(4, 6), correlated(50, 6), Grid(3, 6)
    given, scale = undamped(w, x), scales(w, grid)
    step = steps(given, scale)
    fixed = codes(w, scale, grid)
    fixed[:, -1] = torch.nan
    start = torch.where(fixed.isnan(), torch.zeros(()), fixed)
    after = coordinate_descent(given, start, step, grid, fixed)
    for row in range(4):
        losses = []
        for level in grid.levels():
            tried = start.clone()
            tried[row, -1] = level
            losses.append(layer_error(w[row : row + 1], (tried * step / given.norm)[row : row + 1], x))
        assert after[row, -1] == grid.levels()[losses.index(min(losses))]
    assert torch.equal(after[:, :-1], start[:, :-1])


def test_refitted_scales_are_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, grid = matrix(), correlated(), Grid(3, 16)
    given, scale = undamped(w, x), scales(w, grid)
    levels = codes(w, scale, grid)
    levels[2, :16] = 0  # a group without any level keeps its scale
    refitted = refit_scales(given, levels, scale)
    for row in (0, 1, 3):
        basis = torch.stack([(levels[row, g * 16 : g * 16 + 16] @ x[:, g * 16 : g * 16 + 16].T) for g in range(3)], 1)
        exact = torch.linalg.lstsq(basis.double(), (x @ w[row])[:, None].double()).solution[:, 0]
        torch.testing.assert_close(refitted[row].double(), exact, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(refitted[2, 0], scale[2, 0])
    monkeypatch.setattr(rounding, "UNKNOWNS", 2 * 3**2)  # two rows at a time
    torch.testing.assert_close(refit_scales(given, levels, scale), refitted)


def test_searched_scales_are_never_worse_and_reach_to_both_sides() -> None:
    w, grid, importance = matrix(64, 48), Grid(3, 16), torch.rand(48) + 0.1

    def error(scale: Tensor) -> Tensor:
        return grid.groups((w - fake_quantize(w, scale, grid)).square() * importance).sum(-1)

    found = searched_scales(w, grid, importance)
    assert (error(found) <= error(scales(w, grid)) + 1e-6).all()
    assert error(found).sum() < 0.9 * error(scales(w, grid)).sum()
    assert (found < 0).any()
    assert (found > 0).any()
    assert (searched_scales(w, Grid(4, 16, "nf4"), importance) > 0).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int"])
def test_a_pinned_grid_is_found_again_from_the_values(kind: str) -> None:
    grid = Grid(4, 16, kind, pinned=True)
    model = tiny("llama")
    report = compress_blocks(model, batches(), solvers["gptq"](grid=grid))
    for weight in weights(model):
        scale = report.scales[weight.name]
        torch.testing.assert_close(scales(weight.matrix, grid), scale, rtol=2e-7, atol=0)
        assert torch.equal(from_codes(codes(weight.matrix, scale, grid), scale), weight.matrix)
    w = matrix()
    pins = pinned(w, grid)
    assert pins is not None
    assert (grid.groups(pins).sum(-1) == 1).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_zeros_stay_zero_and_every_weight_is_on_its_grid(name: str) -> None:
    model, grid = tiny(name), Grid(4, 32)
    prune(model, [], method="criterion", criterion="magnitude", sparsity=0.5, pattern="2:4")
    zeros = {w.name: w.matrix == 0 for w in weights(model)}
    before = {w.name: w.matrix.clone() for w in weights(model)}
    report = compress_blocks(model, batches(), solvers["gptq"](grid=grid))
    for weight in weights(model):
        assert (weight.matrix[zeros[weight.name]] == 0).all()
        assert torch.equal(fake_quantize(weight.matrix, report.scales[weight.name], grid), weight.matrix)
        assert not torch.equal(weight.matrix, before[weight.name])


def test_a_grid_of_its_own_for_a_weight() -> None:
    model, name = tiny("llama"), "model.layers.0.self_attn.k_proj.weight"
    report = compress_blocks(model, batches(), solvers["gptq"](grid=Grid(2, 32), grids={name: Grid(8)}))
    assert report.scales[name].shape[1] == 1
    found = {w.name: w.matrix for w in weights(model)}
    ratio = (found[name] / report.scales[name]).round().abs().max()
    assert 50 < ratio < 128
    other = "model.layers.0.self_attn.v_proj.weight"
    assert len((found[other] / report.scales[other].repeat_interleave(32, 1)).round().unique()) <= 4


def test_the_container_stores_what_the_solver_chose(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    report = compress_blocks(model, batches(), solvers["gptq"](grid=Grid(3, 32)))
    assert any((scale < 0).any() for scale in report.scales.values())
    chosen = {w.name: w.matrix.clone() for w in weights(model)}
    written = quantize(
        model, tmp_path / "out", backend="compressed-tensors", bits=3, group_size=32, scales=report.scales
    )
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(written.model(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert all(torch.equal(w.matrix, chosen[w.name]) for w in weights(model))


def test_a_grid_with_zero_points_is_refused() -> None:
    with pytest.raises(CompressError, match="zero points") as error:
        compress_blocks(tiny("llama"), batches(), solvers["gptq"](grid=Grid(4, 16, "uint")))
    assert "layers.0.self_attn" in error.value.where


def test_a_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(CompressError, match="group size 48") as error:
        compress_blocks(tiny("llama"), batches(), solvers["gptq"](grid=Grid(4, 48)))
    assert "layers.0.self_attn" in error.value.where
