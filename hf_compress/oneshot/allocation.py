"""Bits of each part under a budget, from a table of what rounding it costs. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch

from hf_compress.errors import CompressError

SLOTS = 20_000  # of the budget that are told apart, where sizes have no common divisor that needs fewer

Table = Mapping[str, Mapping[int, float]]
"""Part -> bits -> loss, or size."""


def allocate(losses: Table, sizes: Table, budget: float) -> dict[str, int]:
    """Part -> bits with the least sum of losses whose sum of sizes is within `budget`: a knapsack, one choice a part.

    Exact where the sizes' common divisor leaves at most `SLOTS` slots; else sizes are rounded up to slots, so that the
    budget still holds, and the same bits for all win where they are better. Either way no worse than uniform bits
    within the budget, and never worse for a larger one.

    Args:
        sizes: for the same bits as `losses`, whole numbers in any unit, that of `budget`.

    Raises:
        CompressError: the smallest choice of every part is over the budget.
    """
    least = {part: min(each.values()) for part, each in sizes.items()}
    room = budget - sum(least.values())
    if not room >= 0:  # NaN too
        raise CompressError(
            f"the budget {budget:g} is below the least that all parts need, {sum(least.values()):g}",
            where="budget",
            next_step="raise the budget, or use larger groups",
        )
    extra = {part: {b: int(size - least[part]) for b, size in each.items()} for part, each in sizes.items()}
    divisor = gcd(*(size for each in extra.values() for size in each.values())) or 1
    most = sum(max(each.values()) for each in extra.values())
    slot = divisor if most <= SLOTS * divisor else -(-most // SLOTS)
    slots = int(min(room, most) // slot)
    best = torch.zeros(slots + 1, dtype=torch.float64)  # [c]: the least loss of the parts so far within c slots
    picks: list[tuple[str, torch.Tensor, list[int], list[int]]] = []
    for part, each in extra.items():
        bits = sorted(each)
        costs = [-(-each[b] // slot) for b in bits]
        tried = torch.full((len(bits), slots + 1), float("inf"), dtype=torch.float64)
        for row, (b, cost) in enumerate(zip(bits, costs, strict=True)):
            if cost <= slots:
                tried[row, cost:] = best[: slots + 1 - cost] + losses[part][b]
        best, pick = tried.min(0)
        picks.append((part, pick.to(torch.int8), bits, costs))
    chosen, here = dict[str, int](), slots
    for part, pick, bits, costs in reversed(picks):
        row = int(pick[here])
        chosen[part], here = bits[row], here - costs[row]

    def loss(choice: Mapping[str, int]) -> float:
        return sum(losses[part][b] for part, b in choice.items())

    return min([chosen, *uniform(sizes, budget)], key=loss)


def uniform(sizes: Table, budget: float) -> list[dict[str, int]]:
    """The choices with the same bits for every part (but those that have one choice only) within the budget."""
    found = []
    for bits in sorted({b for each in sizes.values() for b in each}):
        if all(bits in each or len(each) == 1 for each in sizes.values()):
            choice = {part: bits if bits in each else next(iter(each)) for part, each in sizes.items()}
            if sum(sizes[part][b] for part, b in choice.items()) <= budget:
                found.append(choice)
    return found
