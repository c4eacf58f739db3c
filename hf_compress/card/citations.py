"""The papers behind what was done, as BibTeX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_compress.backends import backends
from hf_compress.criteria import criteria
from hf_compress.losses import losses
from hf_compress.oneshot.solvers import solvers
from hf_compress.registry import Registry
from hf_compress.techniques.qat_options import METHODS

NF4 = "https://arxiv.org/abs/2305.14314"
_KINDS: dict[str, tuple[Registry[Any], ...]] = {  # where the names in a stage's options and facts are looked up
    "prune": (solvers, criteria),
    "train": (losses, criteria, solvers),
    "quantize": (backends, solvers),
}


def papers(facts: dict[str, Any]) -> dict[str, str]:
    """Method -> address of its paper, of every registered method that the stages name; in the order they ran."""
    entries = (facts.get("recipe") or {}).get("stages") or [{}] * len(facts["stages"])
    found: dict[str, str] = {}
    for stage, options in zip(facts["stages"], entries, strict=True):
        named = set(_words(options)) | set(_words(stage["facts"])) | {stage["quantized"]}
        for registry in _KINDS.get(stage["kind"], ()):
            found |= {entry.name: entry.paper for entry in registry if entry.name in named and entry.paper}
        own = options.get("quantize") if isinstance(options, dict) else None  # a stage may be its kind alone
        four_bits = stage["quantized"] == "bitsandbytes" and (own or {}).get("bits") == 4
        found |= {"nf4": NF4} if four_bits or "nf4" in named else {}
        method = stage["facts"].get("techniques", {}).get("QAT", {}).get("method")
        found |= {method: METHODS[method].paper} if method in METHODS else {}
    return found


def bibtex(facts: dict[str, Any]) -> str:
    """Entries of `papers`, one for each address; an address that is not in citations.bib is cited as such."""
    texts = (Path(__file__).parent / "citations.bib").read_text().strip().split("\n\n")
    known = {match[1]: entry for entry in texts if (match := re.search(r"url = \{(.*?)\}", entry))}
    used: dict[str, str] = {}
    for name, address in papers(facts).items():
        plain = f"@misc{{{name.replace('_', '-')},\n  title = {{{name}}},\n  url = {{{address}}}\n}}"
        used.setdefault(address, known.get(address, plain))
    return "\n\n".join(used.values())


def _words(value: Any) -> Iterator[str]:
    """Every string in nested options, and the keys of mappings below the first level (`losses: {forward_kl: 1.0}`)."""
    if isinstance(value, dict):
        kept = value.get("schedule") == "constant"  # zeros are held as they were: its criterion chose nothing
        for key, inner in value.items():
            if kept and key == "criterion":
                continue
            if isinstance(inner, int | float):
                yield str(key)
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield value
