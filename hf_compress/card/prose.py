"""A card is generated sections between marks, and whatever a person wrote around them, which is kept."""

from __future__ import annotations

import re
from typing import Any

import yaml

_SECTION = re.compile(
    r"<!-- hf_compress: (?P<name>[a-z]+), made from hf_compress\.json -->\n.*?<!-- hf_compress: end -->", re.DOTALL
)
_FRONT = re.compile(r"\A---\r?\n(?P<yaml>.*?)\r?\n---\r?\n", re.DOTALL)
_OWN = (
    "library_name",
    "pipeline_tag",
    "license",
    "license_name",
    "license_link",
    "base_model",
    "base_model_relation",
    "datasets",
    "metrics",
    "model-index",
)  # keys of the metadata that are made from the facts


def merge(new: str, old: str) -> str:
    """`new` with the prose and the further metadata of `old`.

    Sections keep the places that `old` gives them; one that is not there yet follows its predecessor; one that is no
    longer made goes. A card without our marks is kept whole, after ours.
    """
    (data, pieces), (old_data, old_pieces) = _split(new), _split(old)
    made = {name: piece for name, piece in pieces if name}
    tags = list(dict.fromkeys([*data.get("tags", []), *_listed(old_data.get("tags"))]))
    kept = {key: value for key, value in old_data.items() if key not in _OWN and key != "tags"}
    body = [(name, made[name] if name else piece) for name, piece in old_pieces if not name or name in made]
    if not any(name for name, _ in old_pieces):
        body = [*pieces, *((None, "\n" + piece.lstrip("\n")) for _, piece in old_pieces if piece.strip())]
    places = [name for name, _ in body]
    before: str | None = None
    for name in made:
        if name not in places:
            at = places.index(before) + 1 if before in places else 0
            body[at:at] = [(None, "\n\n"), (name, made[name])] if at else [(name, made[name]), (None, "\n\n")]
            places = [name for name, _ in body]
        before = name
    front = yaml.safe_dump(data | kept | {"tags": tags}, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n" + "".join(piece for _, piece in body)


def prose_of(card: str) -> str:
    """All that is not generated: text around the sections and further metadata; "" for an untouched card."""
    data, pieces = _split(card)
    own = {key: value for key, value in data.items() if key not in _OWN and key != "tags"}
    written = [piece.strip() for name, piece in pieces if not name and piece.strip()]
    return "\n".join([*written, *([yaml.safe_dump(own)] if own else [])])


def sections_of(card: str) -> dict[str, str]:
    """Name -> text of the generated sections."""
    return {name: piece for name, piece in _split(card)[1] if name}


def _split(card: str) -> tuple[dict[str, Any], list[tuple[str | None, str]]]:
    """Metadata, and the body in pieces: (section's name, text with its marks) or (None, prose)."""
    match = _FRONT.match(card)
    try:
        data = yaml.safe_load(match["yaml"]) if match else {}
    except yaml.YAMLError:
        data, match = {}, None  # a person's half-written card: all of it is prose
    body = card[match.end() :] if match else card
    pieces, at = list[tuple[str | None, str]](), 0
    for section in _SECTION.finditer(body):
        pieces += [(None, body[at : section.start()]), (section["name"], section[0])]
        at = section.end()
    return data if isinstance(data, dict) else {}, [*pieces, (None, body[at:])]


def _listed(value: Any) -> list[str]:
    return [str(x) for x in value] if isinstance(value, list) else []
