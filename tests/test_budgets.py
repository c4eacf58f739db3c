"""Budgets: in their interval, falling with outliers, exact in the mean; expressions that find nothing are named."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from hf_compress.budgets import given, outlier_ratio, owl, uniform
from hf_compress.errors import CompressError
from hf_compress.selection import without

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")]
blocks = st.dictionaries(st.integers(0, 99), st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1)


@settings(deadline=None, max_examples=200)
@cases(blocks, st.floats(0.1, 0.9))
def test_owl_is_exact_in_the_mean_within_reach_and_falls_with_outliers(
    made: dict[int, tuple[float, int]], sparsity: float
) -> None:
    ratios, sizes = {b: r for b, (r, _) in made.items()}, {b: n for b, (_, n) in made.items()}
    found = owl(ratios, sizes, sparsity=sparsity)
    assert sum(found[b] * sizes[b] for b in found) / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-9)
    assert all(sparsity - 0.08 - 1e-9 <= s <= sparsity + 0.08 + 1e-9 for s in found.values())
    ordered = sorted(found, key=lambda b: ratios[b])
    assert all(found[b] <= found[a] for a, b in pairwise(ordered))
    if max(ratios.values()) - min(ratios.values()) > 1e-3:
        assert max(abs(s - sparsity) for s in found.values()) == pytest.approx(0.08)
        assert found[ordered[-1]] < found[ordered[0]]


def test_owl_of_equal_blocks_is_uniform_and_extremes_are_refused() -> None:
    assert owl({0: 0.1, 1: 0.1}, {0: 5, 1: 9}, sparsity=0.5) == uniform({0: 5, 1: 9}, sparsity=0.5) == {0: 0.5, 1: 0.5}
    for sparsity in (0.05, 0.95):
        with pytest.raises(CompressError, match=r"not all in \[0, 1\)"):
            owl({0: 0.1}, {0: 1}, sparsity=sparsity)


def test_outliers_are_counted_over_all_matrices_of_a_block() -> None:
    scores = [torch.ones(2, 10), torch.tensor([[100.0, 1.0, 1.0, 1.0]])]
    assert outlier_ratio(scores) == 1 / 24  # the mean is 123 / 24
    assert outlier_ratio(scores, outlier=0.1) == 1.0
    assert outlier_ratio(scores, outlier=20) == 0.0


def test_given_sparsities_go_to_the_weights_they_name() -> None:
    found = given(NAMES, {r"layers\.1\.mlp": 0.2, "mlp": 0.7}, sparsity=0.5)
    assert list(found.values()) == [0.5, 0.7, 0.5, 0.2]
    with pytest.raises(CompressError, match=r"no weight matches 'up_porj'[\s\S]*did you mean 'up_proj'"):
        given(NAMES, {"up_porj": 0.2}, sparsity=0.5)
    with pytest.raises(CompressError, match=r"1.2 is not in \[0, 1\)[\s\S]*'mlp'"):
        given(NAMES, {"mlp": 1.2}, sparsity=0.5)


def test_what_is_skipped_must_exist_and_something_must_be_left() -> None:
    assert without(NAMES, [r"layers\.0", "q_proj"], where="skip") == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CompressError, match=r"no weight matches 'self_atn'[\s\S]*skip[\s\S]*'self_attn'"):
        without(NAMES, ["self_atn"], where="skip")
    with pytest.raises(CompressError, match="not a regular expression"):
        without(NAMES, ["(mlp"], where="skip")
    with pytest.raises(CompressError, match="every weight is skipped"):
        without(NAMES, ["layers"], where="skip")
