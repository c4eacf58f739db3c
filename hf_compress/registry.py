"""A name -> thing table that fills itself from the files of one package. Used five times: losses, criteria, solvers,
backends, families."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hf_compress.errors import CompressError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing: `summary` and `paper` are what ``hf-compress list`` prints; `traits` are facts callers
    need."""

    name: str
    value: T
    summary: str
    paper: str = ""
    traits: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Entries of one kind. Every file of `package` is imported at the first look-up, so adding one edits no other
    file.

    Raises:
        CompressError: a name that is not registered (with the nearest one), or registered twice.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self._package, self._entries, self._loaded = kind, package, dict[str, Entry[T]](), False

    def register(self, name: str, *, summary: str, paper: str = "", **traits: Any) -> Callable[[T], T]:
        """Decorator: ``@losses.register("forward_kl", summary="...", paper="...")``."""

        def add(value: T) -> T:
            if name in self._entries:
                raise CompressError(f"the {self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, value, summary, paper, traits)
            return value

        return add

    def entry(self, name: str, *, where: str = "") -> Entry[T]:
        """The entry of that name; `where` is the place a wrong one is reported at."""
        self._load()
        if name not in self._entries:
            raise CompressError(
                f"unknown {self.kind} {name!r}", where=where, next_step=did_you_mean(name, self._entries)
            )
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entry(name).value

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True
