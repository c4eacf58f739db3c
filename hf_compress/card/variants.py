"""Several finished folders of one model, side by side: which of them to take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_compress.card.comparison import LABELS, comparison
from hf_compress.card.escape import cell, code, hub_link, text
from hf_compress.card.facts import read_facts, without_folders
from hf_compress.errors import CompressError


def variants(folders: Sequence[Path]) -> list[list[str]]:
    """Rows of one before/after table with a column for each variant, the header first.

    Raises:
        CompressError: fewer than two; one was not measured; they were not measured against the same dense model.
    """
    known = [read_facts(folder) for folder in folders]
    if len(known) < 2:
        raise CompressError("one folder is no comparison", next_step="give two or more; `evaluate` shows one")
    for folder, facts in zip(folders, known, strict=True):
        if facts["evaluation"] is None:
            raise CompressError(
                "nothing was measured of it", where=str(folder), next_step="hf-compress evaluate FOLDER --dense MODEL"
            )
        if _measured_against(facts) != _measured_against(known[0]):
            raise CompressError(
                "not measured against the same dense model, on the same rows",
                where=f"{folders[0]} and {folder}",
                next_step="compare variants of one model, whose recipes have the same model: and data:",
            )
    labels, artefacts = {"dense": LABELS["dense"]}, {"dense": known[0]["evaluation"]["artefacts"]["dense"]}
    for number, facts in enumerate(known):
        for kind in ("root", "onnx"):
            if kind in facts["evaluation"]["artefacts"]:
                artefacts[f"{number} {kind}"] = facts["evaluation"]["artefacts"][kind]
                labels[f"{number} {kind}"] = facts["name"] + (", ONNX int8" if kind == "onnx" else "")
    return comparison({"artefacts": artefacts}, labels)


def variants_card(folders: Sequence[Path]) -> str:
    """`variants` as Markdown, with what was done to each and where it is."""
    rows, known = variants(folders), [without_folders(read_facts(folder)) for folder in folders]
    lines = [f"# Variants of {text(known[0]['base_model'] or 'one model')}", ""]
    for index, row in enumerate(rows):
        lines.append(f"| {' | '.join(map(cell, row))} |")
        if index == 0:
            lines.append("|---|" + "---:|" * (len(row) - 1))
    lines += ["", "Differences and speed-ups are against the dense model as each variant's own run measured it.", ""]
    for facts in known:
        place = hub_link(facts["published"]["repo"]) if facts.get("published") else "not published"
        stages = ", then ".join(code(stage["name"]) for stage in facts["stages"])
        lines.append(f"- **{text(facts['name'])}** ({place}): {stages}")
    return "\n".join(lines) + "\n"


def _measured_against(facts: dict[str, Any]) -> list[Any]:
    """The dense model and the rows: equal for variants that can be compared."""
    dense = facts["evaluation"]["artefacts"]["dense"]
    quality = [dense[name] for name in ("accuracy", "perplexity") if name in dense]
    return [facts["base_model"], dense.get("bytes"), [(q["n"], round(q["value"], 3)) for q in quality]]
