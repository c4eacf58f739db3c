"""What values passed by, counted, and the range to round them within. Knows nothing about models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALF = 2048
"""Bins on either side of 0."""
_SMALLEST = -100


@dataclass
class Seen:
    """Exact least and greatest value, and a histogram of 2 * HALF bins on [-2^exponent, 2^exponent).

    The exponent grows to hold every value, and then bins merge 2^d to one, edge on edge: any order of batches, and any
    split into batches, gives the same counts.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * HALF, dtype=torch.int64))
    exponent: int = _SMALLEST
    low: float = 0.0
    high: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count values of any shape; not finite ones are an error of the caller."""
        flat = values.detach().flatten().float()
        low, high = (float(end) for end in flat.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.grow(max(-self.low, self.high))
        bins = (flat * (HALF / 2.0**self.exponent)).floor().long() + HALF
        self.counts += torch.bincount(bins, minlength=2 * HALF).cpu()

    def grow(self, magnitude: float) -> None:
        """Widen the histogram so that it holds +-magnitude."""
        wanted = max(self.exponent, math.frexp(magnitude)[1] if magnitude else _SMALLEST)
        if wanted > self.exponent:
            old = torch.arange(2 * HALF) - HALF
            places = HALF + torch.div(old, 2.0 ** min(wanted - self.exponent, 64), rounding_mode="floor").long()
            self.counts = torch.zeros_like(self.counts).index_add_(0, places, self.counts)
            self.exponent = wanted

    def merge(self, other: Seen) -> None:
        """As if what `other` saw had passed by here."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        magnitude = max(-self.low, self.high)
        self.grow(magnitude)
        other.grow(magnitude)
        self.counts = self.counts + other.counts

    @property
    def centres(self) -> Tensor:
        """(2 * HALF,) in fp64."""
        return (torch.arange(2 * HALF, dtype=torch.float64) - HALF + 0.5) * (2.0**self.exponent / HALF)


Observer = Callable[[Seen, int], tuple[float, float]]
"""From what was seen, and bits, to a range low <= 0 <= high."""


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero: levels 0 .. 2^b - 1 span the range, and 0 lies exactly on level `zero`."""
    steps = (1 << bits) - 1
    scale = (high - low) / steps if high > low else 1e-30  # nothing but zeros: clip to 0
    return scale, min(steps, max(0, round(-low / scale)))


def min_max(seen: Seen, bits: int) -> tuple[float, float]:
    """All that was seen: nothing is clipped."""
    return seen.low, seen.high


def percentile(seen: Seen, bits: int, *, share: float = 99.99) -> tuple[float, float]:
    """Without the (100 - share) / 2 percent at either end, to within a bin; 100 is `min_max`."""
    total = seen.counts.cumsum(0).double()
    out = total[-1] * (1 - share / 100) / 2
    first = int(torch.searchsorted(total, out, right=True))
    last = int(torch.searchsorted(total, total[-1] - out))
    width = 2.0**seen.exponent / HALF
    low, high = (first - HALF) * width, (last + 1 - HALF) * width
    return min(0.0, max(seen.low, low)), max(0.0, min(seen.high, high))


def squared_error(seen: Seen, low: float, high: float, bits: int) -> float:
    """Mean of (x - rounded x)^2 over the histogram, x at the centres of its bins."""
    scale, zero = affine(low, high, bits)
    level = (seen.centres / scale + zero).round().clamp(0, (1 << bits) - 1)
    error = (level - zero) * scale - seen.centres
    return float((error.square() * seen.counts).sum() / seen.counts.sum().clamp_min(1))


def mse(seen: Seen, bits: int) -> tuple[float, float]:
    """The range with the least `squared_error`, among parts of the whole one: the upper end is searched, then the
    lower, then the upper again; never worse than `min_max`."""
    low, high = seen.low, seen.high
    shares = [i / 64 for i in range(1, 65)]
    for turn in range(3):
        if turn % 2:
            low = min((s * seen.low for s in shares), key=lambda end: squared_error(seen, end, high, bits))
        else:
            high = min((s * seen.high for s in shares), key=lambda end: squared_error(seen, low, end, bits))
    return low, high


def entropy(seen: Seen, bits: int) -> tuple[float, float]:
    """The part [c low, c high] of the range with the least KL(P || Q): P the histogram with what is clipped added to
    the end bins, Q the same mass spread evenly over the occupied bins of each level.

    Migacz 2017, "8-bit inference with TensorRT".
    """
    best, least = (seen.low, seen.high), math.inf
    covered = max(1.0, (seen.high - seen.low) * HALF / 2.0**seen.exponent)
    start = min(1.0, (1 << bits) / covered)
    for step in range(64):
        share = min(1.0, start + (1 - start) * step / 63)  # the last may be rounded above 1
        low, high = share * seen.low, share * seen.high
        found = _divergence(seen, low, high, bits)
        if found <= least:
            best, least = (low, high), found
    return best


def _divergence(seen: Seen, low: float, high: float, bits: int) -> float:
    width = 2.0**seen.exponent / HALF
    first, last = (math.floor(end / width) + HALF for end in (low, high))
    inner = seen.counts[first : last + 1].double()
    clipped = inner.clone()
    clipped[0] += seen.counts[:first].sum()
    clipped[-1] += seen.counts[last + 1 :].sum()
    scale, zero = affine(low, high, bits)
    level = (seen.centres[first : last + 1] / scale + zero).round().clamp(0, (1 << bits) - 1).long()
    mass = torch.zeros(1 << bits, dtype=torch.float64).index_add_(0, level, inner)
    occupied = torch.zeros(1 << bits, dtype=torch.float64).index_add_(0, level, (clipped > 0).double())
    spread = torch.where(clipped > 0, (mass / occupied.clamp_min(1))[level], 0.0)
    p, q = clipped / clipped.sum().clamp_min(1), spread / spread.sum().clamp_min(1)
    here = p > 0
    return float((p[here] * (p[here] / q[here].clamp_min(1e-12)).log()).sum())


OBSERVERS: dict[str, Observer] = {"min_max": min_max, "percentile": percentile, "mse": mse, "entropy": entropy}
