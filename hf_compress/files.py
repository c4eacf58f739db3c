"""Files that are whole or not there, and what they come to."""

from __future__ import annotations

import hashlib
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write through a temporary sibling, so that a full disk leaves no half file under the final name."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.rename(path)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
