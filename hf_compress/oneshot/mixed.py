"""Not all weights in the same number of bits: which grid each has, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_compress.errors import CompressError, did_you_mean
from hf_compress.grids import Grid
from hf_compress.selection import matching

Overrides = Mapping[str, Mapping[str, int | None]]
"""Regular expression -> ``bits``, ``group_size`` or both, of the weights it finds."""

_KEYS = ("bits", "group_size")


def check_overrides(overrides: Overrides, *, where: str) -> None:
    """Raise a CompressError for what is wrong whatever the model: other keys, or none; no bits."""
    for pattern, own in overrides.items():
        place = f"{where}: {pattern!r}"
        if not own:
            raise CompressError("nothing is overridden", where=place, next_step="bits, group_size or both")
        for key, value in own.items():
            if key not in _KEYS:
                raise CompressError(f"unknown key {key!r}", where=place, next_step=did_you_mean(key, _KEYS))
            if value is None and key == "bits":
                raise CompressError("bits is a number", where=place)


def given_grids(
    names: Sequence[str], overrides: Overrides, grid: Grid, *, where: str = "overrides"
) -> dict[str, Grid]:
    """Weight name -> its grid, for those that an expression finds (the first one that does): `grid` with what is
    overridden.

    Raises:
        CompressError: an expression that finds no name (with the nearest).
    """
    found: dict[str, Grid] = {}
    for pattern, own in reversed(list(overrides.items())):
        found |= dict.fromkeys(matching(pattern, names, where=where), replace(grid, **own))  # type: ignore[arg-type]
    return found
