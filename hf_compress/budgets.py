"""How one overall sparsity is shared out: block or weight -> its own sparsity. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.selection import matching

OUTLIER = 5.0  # a score above so many means is an outlier
REACH = 0.08  # how far a block may be from the overall sparsity


def uniform(sizes: Mapping[int, int], *, sparsity: float) -> dict[int, float]:
    """Every block (index -> number of weights) gets the overall sparsity."""
    return dict.fromkeys(sizes, sparsity)


def outlier_ratio(scores: Sequence[Tensor], *, outlier: float = OUTLIER) -> float:
    """Share of a block's scores (of all its matrices together) that exceed `outlier` times their mean.

    D_l of OWL (Yin et al. 2024, https://arxiv.org/abs/2310.05175), which takes Wanda's scores.
    """
    count = sum(each.numel() for each in scores)
    mean = sum(float(each.double().sum()) for each in scores) / count
    return sum(int((each > outlier * mean).sum()) for each in scores) / count


def owl(
    ratios: Mapping[int, float], sizes: Mapping[int, int], *, sparsity: float, reach: float = REACH
) -> dict[int, float]:
    """Blocks with more outliers keep more: s_l = s - reach * (D_l - D) / max |D_k - D|, D the mean ratio.

    The mean of s_l is s, both means weighted by `sizes` (weights of a block), and every s_l lies in
    [s - reach, s + reach]; blocks that do not differ get s. Yin et al. 2024, https://arxiv.org/abs/2310.05175, whose
    code shifts by the mean after scaling to [0, 2 reach], so that a skewed D leaves their own interval.

    Raises:
        CompressError: the interval is not within [0, 1).
    """
    if not (sparsity - reach >= 0 and sparsity + reach < 1 and reach >= 0):
        raise CompressError(
            f"budgets within {reach:g} of the sparsity {sparsity:g} are not all in [0, 1)",
            where="budget",
            next_step="use budget: uniform at this sparsity",
        )
    total = sum(sizes[block] for block in ratios)
    mean = sum(ratio * sizes[block] for block, ratio in ratios.items()) / total
    widest = max(abs(ratio - mean) for ratio in ratios.values())
    if widest <= 1e-12:  # equal but for rounding
        return dict.fromkeys(ratios, sparsity)
    return {block: sparsity - reach * (ratio - mean) / widest for block, ratio in ratios.items()}


def given(
    names: Sequence[str], sparsities: Mapping[str, float], *, sparsity: float, where: str = "sparsities"
) -> dict[str, float]:
    """Weight name -> sparsity: that of the first regular expression found in it, else the overall one.

    Raises:
        CompressError: an expression that finds no name (with the nearest); a sparsity outside [0, 1).
    """
    chosen = dict.fromkeys(names, sparsity)
    for pattern, own in reversed(list(sparsities.items())):
        if not 0 <= own < 1:
            raise CompressError(f"sparsity {own:g} is not in [0, 1)", where=f"{where}: {pattern!r}")
        chosen |= dict.fromkeys(matching(pattern, names, where=where), own)
    return chosen
