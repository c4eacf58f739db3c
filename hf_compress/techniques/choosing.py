"""Which weights of a model go: scores of every matrix, a sparsity of each, and what competes with what -> masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from hf_compress.budgets import outlier_ratio, owl
from hf_compress.errors import CompressError, at
from hf_compress.patterns import NM, global_masks, mask_of, parse_pattern
from hf_compress.techniques.masking import Masks
from hf_compress.weights import Weight

Score = Callable[[Weight], Tensor]
"""Importance (out, in) of each weight of a matrix; higher = keep."""


def chosen(
    score: Score, masks: Masks, *, sparsity: float, shares: Mapping[str, float], pattern: str, group: str
) -> Iterator[tuple[Weight, Tensor]]:
    """Each weight with its next mask, which lies within the one it has.

    sparsity: of the whole, now. shares: weight name -> its own sparsity over the whole's, 1 without budgets.

    Raises:
        CompressError: as `mask_of`, naming the weight.
    """
    if group == "global":
        scores = {w.name: score(w) for w in masks.weights}
        found = global_masks(scores, sparsity=sparsity, pattern=pattern, within=masks.items() or None)
        yield from ((w, found[w.name]) for w in masks.weights)
        return
    for weight in masks.weights:
        own = sparsity * shares[weight.name]
        with at(weight.name):
            mask = mask_of(score(weight), sparsity=own, pattern=pattern, group=group, within=masks.of(weight))
        yield weight, mask


def owl_sparsities(score: Score, weights: list[Weight], *, sparsity: float) -> dict[str, float]:
    """Weight name -> the sparsity of its block, by the outliers among the block's scores."""
    by_block: dict[int, list[Weight]] = {}
    for weight in weights:
        assert weight.block is not None
        by_block.setdefault(weight.block, []).append(weight)
    ratios = {block: outlier_ratio([score(w) for w in group]) for block, group in by_block.items()}
    sizes = {block: sum(w.shape[0] * w.shape[1] for w in group) for block, group in by_block.items()}
    found = owl(ratios, sizes, sparsity=sparsity)
    return {w.name: found[block] for block, group in by_block.items() for w in group}


def present(weights: list[Weight], *, sparsity: float, pattern: str) -> list[tuple[Weight, Tensor]]:
    """Each weight with the mask of the zeros it already has.

    Raises:
        CompressError: fewer zeros than `sparsity` (by more than 1%), or groups that are not N:M.
    """
    found = [(weight, weight.matrix != 0) for weight in weights]
    share = sum(int((~mask).sum()) for _, mask in found) / sum(mask.numel() for _, mask in found)
    if share < sparsity - 0.01:
        raise CompressError(
            f"{share:.1%} of the weights are zero, and schedule constant keeps {sparsity:.0%} that are there already",
            where="prune.schedule",
            next_step="use oneshot, or prune the model before",
        )
    nm = parse_pattern(pattern)
    for weight, mask in found if isinstance(nm, NM) else []:
        assert isinstance(nm, NM)
        if (mask.reshape(-1, nm.of).sum(1) > nm.keep).any():
            raise CompressError(
                f"the zeros that are there are not {pattern}",
                where=weight.name,
                next_step="use oneshot, or name the pattern the model was pruned to",
            )
    return found
