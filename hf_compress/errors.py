"""The one exception a user of hf_compress sees: what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CompressError(Exception):
    """Something a person can mend: bad input, a missing extra, a container that cannot store a weight.

    Args:
        what: the problem in one sentence.
        where: the place: a recipe path (``stages[0].prune.pattern``), a weight's name, a file.
        next_step: what to do about it, as an imperative.
    """

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        self.what, self.where, self.next_step = what, where, next_step
        lines = [what] + [f"  {label}: {text}" for label, text in (("where", where), ("next", next_step)) if text]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.next_step)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Inside, a `CompressError` is said to be at `where`, which the caller knows and a shared check does not; ``{}``
    in it stands for the place that the error names."""
    try:
        yield
    except CompressError as error:
        place = where.replace("{}", error.where).rstrip(": .")
        raise CompressError(error.what, where=place, next_step=error.next_step) from error


def _rebuild(kind: type[CompressError], what: str, where: str, next_step: str) -> CompressError:
    return kind(what, where=where, next_step=next_step)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"did you mean 'magnitude'?"``, or the list of what is known when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)


def require(module: str, *, extra: str, what: str) -> None:
    """Raise a `CompressError` naming the pip extra when an optional library is missing."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise CompressError(
            f"{what} needs the package {module!r}, which is not installed",
            next_step=f"pip install 'hf-compress[{extra}]'",
        )
