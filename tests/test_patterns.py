"""Exact counts, deterministic ties, nested masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.criteria import Statistics, criteria
from hf_compress.errors import CompressError
from hf_compress.patterns import mask_of, parse_pattern

scores = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 10_000)).map(
    lambda t: torch.randint(0, 5, (t[0], 4 * t[1]), generator=torch.Generator().manual_seed(t[2])).float()
)


@settings(deadline=None, max_examples=60)
@given(scores, st.floats(0, 1), st.sampled_from(["row", "layer"]))
def test_density_is_exact_in_every_group(matrix: torch.Tensor, sparsity: float, group: str) -> None:
    mask = mask_of(matrix, sparsity=sparsity, group=group)
    counts = (~mask).sum(1) if group == "row" else (~mask).sum()[None]
    size = matrix.shape[1] if group == "row" else matrix.numel()
    assert (counts == round(sparsity * size)).all()
    for row_scores, row_mask in zip(
        matrix if group == "row" else [matrix.flatten()], mask if group == "row" else [mask.flatten()], strict=True
    ):
        if row_mask.any() and (~row_mask).any():
            assert row_scores[row_mask].min() >= row_scores[~row_mask].max()


@settings(deadline=None, max_examples=60)
@given(scores)
def test_two_of_four_holds_in_every_group(matrix: torch.Tensor) -> None:
    assert (mask_of(matrix, sparsity=0.5, pattern="2:4").reshape(-1, 4).sum(1) == 2).all()


@settings(deadline=None, max_examples=60)
@given(scores, st.floats(0, 1), st.floats(0, 1))
def test_masks_are_nested_when_sparsity_grows(matrix: torch.Tensor, a: float, b: float) -> None:
    low, high = mask_of(matrix, sparsity=min(a, b)), mask_of(matrix, sparsity=max(a, b))
    assert (high <= low).all()


def test_ties_keep_the_lower_index() -> None:
    assert mask_of(torch.ones(1, 4), sparsity=0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "half"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(CompressError, match="pattern"):
        parse_pattern(pattern)


def test_a_group_that_does_not_divide_and_nan_are_refused() -> None:
    with pytest.raises(CompressError, match="does not divide 6"):
        mask_of(torch.ones(2, 6), sparsity=0.5, pattern="2:4")
    with pytest.raises(CompressError, match="not finite"):
        mask_of(torch.full((2, 4), torch.nan), sparsity=0.5)


def test_wanda_with_equal_inputs_is_magnitude_per_row_and_ignores_the_scale_of_inputs() -> None:
    weight, norm = torch.randn(8, 16), torch.rand(16) + 0.1

    def score(x: torch.Tensor) -> torch.Tensor:
        return mask_of(criteria["wanda"](weight, Statistics(input_norm=x)), sparsity=0.5, group="row")

    assert torch.equal(
        score(torch.full((16,), 3.0)), mask_of(criteria["magnitude"](weight, Statistics()), sparsity=0.5, group="row")
    )
    assert torch.equal(score(norm), score(norm * 7))
