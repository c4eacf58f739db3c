"""Regular expressions -> names, where one that finds nothing is a mistake and not a quiet no-op."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hf_compress.errors import CompressError, did_you_mean


def matching(pattern: str, names: Sequence[str], *, where: str) -> list[str]:
    """The names in which `pattern` is found (``re.search``), in order.

    Raises:
        CompressError: not a regular expression; found in no name (with the nearest part of a name).
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise CompressError(f"{pattern!r} is not a regular expression: {error}", where=where) from error
    found = [name for name in names if expression.search(name)]
    if not found:
        kinds = {re.sub(r"\.\d+\b", ".*", name) for name in names}
        parts = kinds | {part for kind in kinds for part in kind.split(".") if part != "*"}
        parts |= {numbered for name in names for numbered in re.findall(r"\w+\.\d+", name)}
        raise CompressError(f"no weight matches {pattern!r}", where=where, next_step=did_you_mean(pattern, parts))
    return found


def without(names: Sequence[str], skip: Iterable[str], *, where: str) -> list[str]:
    """`names` less those that any expression of `skip` finds.

    Raises:
        CompressError: as `matching`; nothing is left.
    """
    gone = {name for pattern in skip for name in matching(pattern, names, where=where)}
    left = [name for name in names if name not in gone]
    if not left:
        raise CompressError("every weight is skipped", where=where, next_step="skip less")
    return left
