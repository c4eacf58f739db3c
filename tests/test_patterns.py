"""Exact counts, deterministic ties, nested masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.errors import CompressError
from hf_compress.masks import packed, sha256, unpacked
from hf_compress.patterns import Block, check_target, global_masks, mask_of, parse_pattern

scores = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 10_000)).map(
    lambda t: torch.randint(-2, 3, (2 * t[0], 4 * t[1]), generator=torch.Generator().manual_seed(t[2])).float()
)
share = st.floats(0, 1, exclude_max=True)
anything = st.sampled_from(
    [{"group": "row"}, {"group": "layer"}, {"pattern": "2:4"}, {"pattern": "2x4"}, {"pattern": "1x2", "group": "row"}]
)
quick = settings(deadline=None, max_examples=60)


def by_sorting(matrix: torch.Tensor, drop: int) -> torch.Tensor:
    """The oracle: a stable descending sort, the last `drop` go."""
    mask = torch.ones(matrix.numel(), dtype=torch.bool)
    mask[matrix.flatten().argsort(descending=True, stable=True)[matrix.numel() - drop :]] = False
    return mask.view_as(matrix)


@quick
@given(scores, share, st.sampled_from(["row", "layer"]))
def test_exactly_the_lowest_go_and_of_equals_the_higher_index(
    matrix: torch.Tensor, sparsity: float, group: str
) -> None:
    rows = matrix if group == "row" else matrix.reshape(1, -1)
    expected = torch.stack([by_sorting(row, round(sparsity * rows.shape[1])) for row in rows])
    assert torch.equal(mask_of(matrix, sparsity=sparsity, group=group), expected.view_as(matrix))


@quick
@given(scores, share, st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]))
def test_n_of_m_holds_in_every_group_and_keeps_the_highest(
    matrix: torch.Tensor, sparsity: float, nm: tuple[int, int]
) -> None:
    keep, of = nm
    full = mask_of(matrix, sparsity=1 - keep / of, pattern=f"{keep}:{of}").reshape(-1, of)
    assert (full.sum(1) == keep).all()
    on_the_way = mask_of(matrix, sparsity=sparsity, pattern=f"{keep}:{of}").reshape(-1, of)
    drop = min(of - keep, int(sparsity * of + 1e-9))
    expected = torch.stack([by_sorting(group, drop) for group in matrix.reshape(-1, of)])
    assert torch.equal(on_the_way, expected)


@quick
@given(scores, share, st.sampled_from(["2x4", "2x1", "1x4"]), st.sampled_from(["row", "layer"]))
def test_blocks_go_whole_by_their_sum(matrix: torch.Tensor, sparsity: float, pattern: str, group: str) -> None:
    block = parse_pattern(pattern)
    assert isinstance(block, Block)
    shape = (matrix.shape[0] // block.rows, block.rows, matrix.shape[1] // block.columns, block.columns)
    tiles = mask_of(matrix, sparsity=sparsity, pattern=pattern, group=group).view(shape)
    assert torch.equal(tiles.all(3).all(1), tiles.any(3).any(1))
    sums = matrix.view(shape).sum((1, 3))
    assert torch.equal(tiles[:, 0, :, 0], mask_of(sums, sparsity=sparsity, group=group))


@quick
@given(scores, share, share, anything)
def test_masks_are_nested_when_sparsity_grows(matrix: torch.Tensor, a: float, b: float, options: dict) -> None:
    low, high = (mask_of(matrix, sparsity=s, **options) for s in (min(a, b), max(a, b)))
    assert (high <= low).all()


@quick
@given(scores, scores, share, share, anything)
def test_masks_within_an_earlier_one_lie_in_it_whatever_the_scores(
    matrix: torch.Tensor, other: torch.Tensor, a: float, b: float, options: dict
) -> None:
    other = other.repeat(9, 8)[: matrix.shape[0], : matrix.shape[1]]
    other = torch.nn.functional.pad(other, (0, matrix.shape[1] - other.shape[1], 0, matrix.shape[0] - len(other)))
    earlier = mask_of(matrix, sparsity=min(a, b), **options)
    later = mask_of(other, sparsity=max(a, b), within=earlier, **options)
    assert (later <= earlier).all()
    assert later.sum() == mask_of(matrix, sparsity=max(a, b), **options).sum()


@quick
@given(st.lists(scores, min_size=1, max_size=4), share, share)
def test_one_threshold_over_matrices_is_a_sort_of_all_their_scores(
    matrices: list[torch.Tensor], a: float, b: float
) -> None:
    named = {str(i): m * 10.0 ** (2 * i - 3) for i, m in enumerate(matrices)}
    together = torch.cat([m.flatten() for m in named.values()])
    masks = [global_masks(named, sparsity=s) for s in (min(a, b), max(a, b))]
    for mask, sparsity in zip(masks, (min(a, b), max(a, b)), strict=True):
        expected = by_sorting(together, round(sparsity * len(together)))
        assert torch.equal(torch.cat([m.flatten() for m in mask.values()]), expected)
    assert all((masks[1][name] <= masks[0][name]).all() for name in named)
    within = global_masks({n: -m for n, m in named.items()}, sparsity=max(a, b), within=masks[0])
    assert all((within[name] <= masks[0][name]).all() for name in named)
    assert sum(m.sum() for m in within.values()) == sum(m.sum() for m in masks[1].values())


def test_global_blocks_are_counted_as_blocks_and_extremes_are_ordered() -> None:
    named = {"a": torch.tensor([[-3e38, 1e-44], [0.0, -1e-44]]).repeat(1, 2), "b": torch.full((2, 2), 3e38)}
    masks = global_masks(named, sparsity=2 / 12)
    assert (~masks["a"]).nonzero().tolist() == [[0, 0], [0, 2]]
    blocks = global_masks(named, sparsity=1 / 6, pattern="2x1")
    assert [int((~m).sum()) for m in blocks.values()] == [2, 0]
    with pytest.raises(CompressError, match="not over the whole model"):
        global_masks(named, sparsity=0.5, pattern="1:2")


def test_ties_keep_the_lower_index() -> None:
    assert mask_of(torch.ones(1, 4), sparsity=0.5).tolist() == [[True, True, False, False]]
    assert mask_of(torch.ones(1, 4), sparsity=0.5, pattern="2:4").tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "half", "1x1", "0x4", "block:4x4"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(CompressError, match="pattern"):
        parse_pattern(pattern)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_zero_to_one_is_refused(sparsity: float) -> None:
    with pytest.raises(CompressError, match=r"not in \[0, 1\)"):
        check_target(sparsity, "unstructured")
    with pytest.raises(CompressError, match=r"not in \[0, 1\)"):
        mask_of(torch.ones(2, 4), sparsity=sparsity)


def test_sizes_that_do_not_divide_and_nan_are_refused() -> None:
    with pytest.raises(CompressError, match="4 does not divide 6 inputs"):
        mask_of(torch.ones(2, 6), sparsity=0.5, pattern="2:4")
    with pytest.raises(CompressError, match="4 does not divide 6 outputs"):
        mask_of(torch.ones(6, 4), sparsity=0.5, pattern="4x1")
    with pytest.raises(CompressError, match=r"sparsity of 0\.5, not 0\.6"):
        check_target(0.6, "2:4")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(CompressError, match="not finite"):
            mask_of(torch.tensor([[0.0, bad]]), sparsity=0.5)


@quick
@given(scores)
def test_packing_is_one_bit_a_weight_and_comes_back(matrix: torch.Tensor) -> None:
    mask = matrix > 0
    bits = packed(mask)
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, (mask.shape[0], mask.shape[1]), where="w"), mask)
    with pytest.raises(CompressError, match="another model"):
        unpacked(bits, (mask.shape[0], 2 * mask.shape[1]), where="w")
    flipped = mask.clone()
    flipped[0, 0] = ~flipped[0, 0]
    assert len({sha256({n: m}) for n, m in (("w", mask), ("w", flipped), ("v", mask), ("w", mask.view(1, -1)))}) == 4
    assert sha256({"a": mask, "b": flipped}) == sha256({"b": flipped, "a": mask})
