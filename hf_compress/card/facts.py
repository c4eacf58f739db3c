"""hf_compress.json: what was done and measured, beside the model it is about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_compress.errors import CompressError

FACTS = "hf_compress.json"


def read_facts(folder: Path) -> dict[str, Any]:
    """What was recorded of a finished folder.

    Raises:
        CompressError: the folder holds no facts.
    """
    path = folder / FACTS
    if not path.is_file():
        raise CompressError(
            f"no {FACTS} here", where=str(folder), next_step="give a folder that `hf-compress run` finished"
        )
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def save_facts(facts: dict[str, Any], path: Path) -> None:
    """Write JSON through a temporary sibling, so that a full disk leaves no half file under the final name."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(facts, indent=2))
    temporary.rename(path)


def without_folders(facts: Any) -> Any:
    """Absolute paths by their last name: where things lay on the maker's machine is nobody's business."""
    if isinstance(facts, dict):
        return {key: without_folders(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [without_folders(value) for value in facts]
    return re.sub(r"(?<![\w:/.~-])/(?:[\w.@+~-]+/)+(?=[\w.@+~-])", "", facts) if isinstance(facts, str) else facts
