"""hf_compress.json: what was done and measured, beside the model it is about."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hf_compress
from hf_compress.errors import CompressError
from hf_compress.files import write_whole

FACTS = "hf_compress.json"
_FOLDERS = re.compile(r"(?<![\w:/.~-])(?:(?:\.\.?|~)?/)+(?:[\w.@+~-]+/)*(?=[\w.@+~-])")  # absolute, or from ../ or ~/
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "bitsandbytes", "peft", "compressed-tensors")
EXTRAS = ("torchao", "onnxruntime", "hqq")


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
    """Write them as JSON, whole or not at all."""
    write_whole(path, json.dumps(facts, indent=2))


def versions() -> dict[str, str]:
    """Of hf_compress and the libraries that decide what comes out."""
    found = (*LIBRARIES, *(name for name in EXTRAS if find_spec(name)))
    return {"hf_compress": hf_compress.__version__} | {name: version(name) for name in found}


def without_folders(facts: Any) -> Any:
    """Paths by their last name: where things lay on the maker's machine is nobody's business."""
    if isinstance(facts, dict):
        return {key: without_folders(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [without_folders(value) for value in facts]
    return _FOLDERS.sub("", facts) if isinstance(facts, str) else facts
