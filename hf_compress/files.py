"""Files that are whole or not there, and what they come to."""

from __future__ import annotations

import hashlib
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write through a temporary sibling, so that a full disk leaves no half file under the final name."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.rename(path)


def stamps(place: str | Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of a file, or of each file in a folder that is not hidden (work folders are); []
    where nothing lies there."""
    path = Path(place)

    def shown(file: Path) -> bool:
        return file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)

    files = [path] if path.is_file() else sorted(filter(shown, path.rglob("*")))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
