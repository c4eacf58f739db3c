"""The licence a model comes with: what its own files say, and nothing that they do not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from hf_compress.errors import CompressError
from hf_compress.source import ModelSource, local_path

TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def source_licence(source: ModelSource, stated: str | None) -> dict[str, Any] | None:
    """The licence of what is made from `source`; None when nobody says. stated: the recipe's `license`.

    Returns {"id", "name", "link": as in the source's card, None where it does not say; "files": names of the texts
    beside it; "origin": "source" or "recipe"}.

    Raises:
        CompressError: the recipe states another licence than the source does.
    """
    place = _texts(source)
    found = _in_card(place / "README.md") if place is not None else {}
    files = sorted({p.name for t in TEXTS for p in place.glob(t) if p.is_file()}) if place is not None else []
    if stated and found.get("license") not in (None, stated):
        raise CompressError(
            f"the recipe says {stated!r}, the model itself {found['license']!r}",
            where="recipe: license",
            next_step="leave `license` out: the result inherits what the model says",
        )
    if not stated and not found and not files:
        return None
    return {
        "id": found.get("license") or stated or "other",
        "name": found.get("license_name"),
        "link": found.get("license_link") or (files[0] if files else None),
        "files": files,
        "origin": "source" if found or files else "recipe",
    }


def copy_texts(source: ModelSource, licence: dict[str, Any] | None, folder: Path) -> None:
    """Put the source's licence texts beside the result."""
    place = _texts(source)
    for name in licence["files"] if licence is not None and place is not None else []:
        shutil.copyfile(place / name, folder / name)


def _texts(source: ModelSource) -> Path | None:
    """The folder with the source's card and licence texts, downloaded when it is on the Hub and can be reached."""
    if source.id is None:
        return None
    path = Path(local_path(source.id))
    if path.exists():
        return path
    try:
        return Path(snapshot_download(source.id, revision=source.revision, allow_patterns=["README.md", *TEXTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return None


def _in_card(card: Path) -> dict[str, str]:
    """license, license_name and license_link of a card's metadata: short plain words and links only."""
    if not card.is_file():
        return {}
    try:
        data = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return {}
    fields = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {
        key: value
        for key, value in fields.items()
        if isinstance(value, str) and re.fullmatch(r"[\w./:#?=&%+-]{1,200}", value)
    }
