"""Invariants of grids: what rounding may move, what it never moves, and tables and packing as the containers have
them."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.backends.compressed_tensors import Packing
from hf_compress.errors import CompressError
from hf_compress.grids import (
    FP4,
    KINDS,
    NF4,
    Grid,
    codes,
    fake_quantize,
    fake_quantize_lsq,
    fake_quantize_ste,
    first_scales,
    from_codes,
    k_means,
    pinned,
    scales,
    spanning,
)
from tests.models import tiny

quick = settings(deadline=None, max_examples=40)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Any:
    """A matrix with zeros, an all-zero row and any magnitude, and a grid for it."""
    kind, size, groups = draw(st.sampled_from(kinds)), draw(st.sampled_from([1, 3, 8])), draw(st.integers(1, 3))
    bits = 4 if kind in ("nf4", "fp4") else draw(st.integers(2, 8))
    made = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    matrix = torch.randn(draw(st.integers(2, 5)), size * groups, generator=made)
    matrix = matrix * 10.0 ** draw(st.integers(-4, 3)) + draw(st.sampled_from([0.0, 0.3])) * matrix.abs().max()
    matrix[0], matrix[:, ::3] = 0, 0
    grouped = size if draw(st.booleans()) else None
    return matrix, k_means(matrix, min(bits, 4), grouped) if kind == "codebook" else Grid(bits, grouped, kind)


def spread(per_group: Tensor, matrix: Tensor) -> Tensor:
    return per_group.repeat_interleave(matrix.shape[1] // per_group.shape[1], 1)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(st.data())
def test_zero_is_exact_and_rounding_twice_changes_nothing(kind: str, data: st.DataObject) -> None:
    matrix, grid = data.draw(cases((kind,)))
    scale, zero = spanning(matrix, grid)
    once = fake_quantize(matrix, scale, grid, zero)
    assert (once[matrix == 0] == 0).all()
    assert torch.equal(codes(once, scale, grid, zero), codes(matrix, scale, grid, zero))
    assert torch.equal(fake_quantize(once, scale, grid, zero), once)
    if grid.kind not in ("uint", "codebook"):  # and the scale is found again
        assert torch.equal(codes(once, scales(once, grid), grid), codes(matrix, scale, grid))


@quick
@given(cases(("int", "uint")), st.floats(0.3, 1.0))
def test_what_is_not_clipped_moves_half_a_step_at_most(case: tuple[Tensor, Grid], shrink: float) -> None:
    matrix, grid = case
    scale, zero = spanning(matrix, grid)
    scale = scale * shrink
    ratio = matrix / spread(scale, matrix) + (0 if zero is None else spread(zero, matrix))
    error = (fake_quantize(matrix, scale, grid, zero) - matrix).abs()
    inside = (ratio >= grid.levels()[0] - 0.5) & (ratio <= grid.levels()[-1] + 0.5)
    assert inside[0].all()
    assert (error <= spread(scale, matrix) * (0.5 + 1e-4))[inside].all()
    if shrink == 1.0:
        assert inside.all()


@quick
@given(cases())
def test_the_nearest_level_is_taken(case: tuple[Tensor, Grid]) -> None:
    matrix, grid = case
    scale, zero = spanning(matrix, grid)
    origin = torch.zeros_like(scale) if zero is None else zero
    points = (torch.tensor(grid.levels()) - origin[..., None]) * scale[..., None]  # (out, groups, levels)
    least = (grid.groups(matrix)[..., None] - points[..., None, :]).abs().amin(-1)
    error = (grid.groups(fake_quantize(matrix, scale, grid, zero)) - grid.groups(matrix)).abs()
    assert (error <= least * (1 + 1e-4) + 1e-4 * scale[..., None]).all()


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_tables_are_those_of_bitsandbytes(kind: str, table: tuple[float, ...]) -> None:
    from bitsandbytes.functional import get_4bit_type

    theirs = get_4bit_type(kind, device="cpu").unique()  # sorted; +0 and -0 of fp4 are one
    torch.testing.assert_close(torch.tensor(table), theirs, atol=1e-7, rtol=1e-6)
    assert Grid(4, 64, kind).levels() == table
    assert 0.0 in table


@pytest.fixture(scope="module")
def packings() -> dict[int, Packing]:
    model, found = tiny("llama"), {}
    for bits in range(2, 9):
        found[bits] = Packing(model, bits=bits)
        found[bits]._packed = {"odd": Grid(bits)}
    return found


@quick
@given(st.integers(2, 8), st.integers(1, 9), st.integers(2, 70), st.integers(0, 10_000))
def test_packing_is_bijective(packings: dict[int, Packing], bits: int, rows: int, width: int, seed: int) -> None:
    grid, made = Grid(bits), torch.Generator().manual_seed(seed)
    low, high = int(grid.levels()[0]), int(grid.levels()[-1])
    levels = torch.randint(low, high + 1, (rows, width), generator=made).float()
    levels[0, 0], levels[-1, -1] = low, high
    scale = torch.rand(rows, 1, generator=made) + 0.5
    values = from_codes(levels, scale)
    stored = packings[bits].encode("odd", values, scale)
    back = packings[bits].decode("odd", stored.__getitem__)
    assert torch.equal(back, values)
    assert torch.equal(codes(back, scale, grid), levels)
    assert stored["odd_packed"].nbytes == 4 * rows * -(-width * bits // 32)


@quick
@given(cases(("int", "uint", "nf4", "powers")), st.floats(0.2, 1.5))
def test_learned_scales_have_the_gradients_of_lsq(case: tuple[Tensor, Grid], size: float) -> None:
    matrix, grid = case
    scale, zero = spanning(matrix, grid)
    scale = scale * size
    weight, step = matrix.clone().requires_grad_(), scale.clone().requires_grad_()
    upstream = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    out = fake_quantize_lsq(weight, step, grid, zero)
    assert torch.equal(out, fake_quantize(matrix, scale, grid, zero))
    (out * upstream).sum().backward()
    origin = (torch.zeros_like(scale) if zero is None else zero)[..., None]
    ratio, level = grid.groups(matrix) / scale[..., None] + origin, grid.groups(codes(matrix, scale, grid, zero))
    inside = (ratio > grid.levels()[0]) & (ratio < grid.levels()[-1])
    assert torch.equal(weight.grad, grid.groups(upstream).masked_fill(~inside, 0).flatten(1))
    each = torch.where(inside, level - ratio, level - origin)
    torch.testing.assert_close(step.grad, (each * grid.groups(upstream)).sum(-1), atol=1e-3, rtol=1e-3)


def test_the_derivative_of_s_round_v_over_s_is_ds_plus_v_over_s() -> None:
    v, s, grid = torch.tensor([[0.83, -2.2, 9.0, -9.0, 0.1]]), torch.tensor([[0.7]]), Grid(3)
    difference = (fake_quantize(v, s + 1e-3, grid) - fake_quantize(v, s - 1e-3, grid)) / 2e-3
    found = []
    for i in range(v.shape[1]):
        step = s.clone().requires_grad_()
        fake_quantize_lsq(v, step, grid)[0, i].backward()
        found.append(float(step.grad))
    clipped = torch.tensor([False, False, True, True, False])
    ds = difference[0] - torch.where(clipped, 0.0, v[0] / s[0])
    torch.testing.assert_close(torch.tensor(found), ds, atol=1e-3, rtol=1e-3)
    assert found[2:4] == [3.0, -4.0]  # Qp and Qn


@pytest.mark.parametrize("size", [1e-6, 1.8e-5, 1e-3])
def test_scales_of_tiny_fp16_weights_clip_nothing(size: float) -> None:
    matrix = (torch.linspace(-1, 1, 64)[None] * size).half()
    scale = scales(matrix, Grid(8))
    assert float(scale) > 0
    off = (fake_quantize(matrix, scale, Grid(8)).float() - matrix.float()).abs()
    assert float(off.max()) <= 1.01 * float(scale)


def test_learned_scales_start_as_in_the_paper() -> None:
    matrix = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(first_scales(matrix, Grid(4, 2)), torch.tensor([[4 / 7**0.5] * 2, [1.0, 1.0]]))
    assert float(first_scales(matrix, Grid(4, 4, "nf4"))[0]) == pytest.approx(4 * 7**0.5)


@quick
@given(cases(("nf4", "fp4", "int")), st.floats(0.3, 2.0))
def test_a_pinned_group_shows_its_scale_as_its_largest_magnitude(case: tuple[Tensor, Grid], size: float) -> None:
    matrix, plain = case
    grid = Grid(plain.bits, plain.group_size, plain.kind, pinned=True)
    scale = scales(matrix, grid) * size
    weight = matrix.clone().requires_grad_()
    out = fake_quantize_lsq(weight, scale, grid)
    nonzero = grid.groups(matrix).abs().amax(-1) > 0
    torch.testing.assert_close(scales(out.detach(), grid)[nonzero], scale[nonzero])
    out.sum().backward()
    pins = pinned(matrix, grid)
    assert pins is not None
    assert (weight.grad[pins] == 1).all()
    assert (out[matrix == 0] == 0).all()


def test_gradient_passes_straight_through_and_values_are_exact() -> None:
    matrix, upstream = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    rounded = fake_quantize_ste(matrix, Grid(4))
    assert torch.equal(rounded, fake_quantize(matrix, scales(matrix, Grid(4)), Grid(4)))
    (rounded * upstream).sum().backward()
    assert torch.equal(matrix.grad, upstream)


@quick
@given(st.integers(2, 5), st.sampled_from([None, 8]), st.integers(0, 10_000))
def test_lloyd_steps_never_raise_the_loss_and_keep_zero(bits: int, group: int | None, seed: int) -> None:
    matrix = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) ** 3
    plain = Grid(bits, group)
    points = plain.groups(matrix) / (scales(matrix, plain)[..., None] * plain.largest)
    losses = []
    for count in range(12):
        grid = k_means(matrix, bits, group, steps=count)
        assert 0.0 in grid.levels()
        assert len(grid.levels()) == 1 << bits
        losses.append(float((points - grid.nearest(points)).square().double().sum()))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_weights_that_are_not_finite_are_refused() -> None:
    for kind in ("int", "uint"):
        with pytest.raises(CompressError, match="not finite"):
            spanning(torch.tensor([[1.0, torch.nan]]), Grid(4, kind=kind))


def test_a_codebook_of_more_weights_than_fp32_can_count() -> None:
    count = (1 << 24) + 4  # the last index, an odd number, rounds up to it in fp32
    grid = k_means(torch.linspace(-1, 1, count)[None], 2, steps=1)
    assert len(grid.levels()) == 4
