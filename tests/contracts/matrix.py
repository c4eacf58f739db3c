"""What each container makes of each family: foreseen from shapes for the README, seen by test_matrix.py."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.backends import backends, foresee
from hf_compress.coverage import KEPT, Coverage
from hf_compress.errors import CompressError
from tests.models import tiny

FAMILIES = ("bert", "gpt2", "llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")
ALIKE = ("qwen2_moe",)  # stacked experts as in qwen3_moe
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    "bitsandbytes": {
        "int8": {"bits": 8},
        "nf4": {"bits": 4},
        "fp4": {"bits": 4, "quant_type": "fp4"},
        "nf4, double_quant": {"bits": 4, "double_quant": True},
    },
    "compressed-tensors": {
        "8 bits": {"bits": 8},
        "8 bits, activations: 8": {"bits": 8, "activations": 8},
        "4 bits, group_size: 32": {"bits": 4, "group_size": 32},
        "3 bits, group_size: 32": {"bits": 3, "group_size": 32},
        "2 bits, group_size: 32": {"bits": 2, "group_size": 32},
    },
    "torchao": {
        "int8": {"bits": 8},
        "int8, group_size: 32": {"bits": 8, "group_size": 32},
        "int8, activations: 8": {"bits": 8, "activations": 8},
        "float8": {"bits": 8, "quant_type": "float8"},
        "float8, group_size: 32": {"bits": 8, "quant_type": "float8", "group_size": 32},
    },
}


def model_of(family: str) -> PreTrainedModel:
    """Half of each block matrix is zeros, so that they are looked for after reloading."""
    return tiny(family, **({"tie_word_embeddings": True} if family == "llama" else {}))


def outcome(covered: Coverage | None, refused: CompressError | None) -> tuple[str, str]:
    """A cell, and the reasons that belong to it."""
    if refused is not None:
        return "refused", f"refused: {refused.what}"
    assert covered is not None
    if covered.share == 1:
        return "all", ""
    left = [why for why in covered.skipped if why not in KEPT.values()]
    return (f"{covered.share:.0%}" if covered.share else "nothing"), "left as they are: " + "; ".join(left)


def foreseen(family: str, backend: str, scheme: str) -> tuple[str, str]:
    with torch.device("meta"):
        model = model_of(family)
    found = foresee(model, backend, **SCHEMES[backend][scheme])
    return outcome(found.coverage, found.refused)


def row(backend: str, scheme: str, cells: dict[str, tuple[str, str]], notes: list[str]) -> str:
    """A line of the table; `notes` collects the reasons it points to."""
    shown = []
    for family in FAMILIES:
        cell, why = cells[family]
        if why and why not in notes:
            notes.append(why)
        shown.append(f"{cell} <sup>{notes.index(why) + 1}</sup>" if why else cell)
    return f"| {backend}: {scheme} | " + " | ".join(shown) + " |"


def containers() -> str:
    """What each backend says of itself."""
    names = ("disk", "memory", "speed", "experts", "serves")
    head = "| container | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|"
    return "\n".join([head, *(f"| {b.name} | " + " | ".join(b.traits[n] for n in names) + " |" for b in backends)])


def table() -> str:
    notes: list[str] = []
    rows = [
        row(backend, scheme, {family: foreseen(family, backend, scheme) for family in FAMILIES}, notes)
        for backend, schemes in SCHEMES.items()
        for scheme in schemes
    ]
    head = "| block matrices stored | " + " | ".join(FAMILIES) + " |\n|---" + "|---" * len(FAMILIES) + "|"
    numbered = "\n".join(f"{number}. {why}" for number, why in enumerate(notes, 1))
    return "\n".join([head, *rows, "", numbered])
