"""Several variants of one model side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_compress.card import FACTS, comparison, read_facts, variants, variants_card
from hf_compress.errors import CompressError

ROOT = Path(__file__).parents[2] / "model_cards"


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """The quickstart's card, and one of a smaller variant without ONNX and without latencies."""
    first = Path(shutil.copytree(ROOT / "quickstart", tmp_path / "first"))
    facts = read_facts(first)
    ours = facts["evaluation"]["artefacts"]
    del ours["onnx"], ours["plain_onnx"], ours["root"]["latency"], ours["dense"]["latency"]
    ours["root"] |= {"bytes": 10_000_000}
    ours["root"]["accuracy"]["value"] = 0.7512
    facts |= {"name": "tiny | <b>", "published": {"repo": "alice/tiny"}}
    return [first, write(tmp_path / "second", facts)]


def write(folder: Path, facts: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / FACTS).write_text(json.dumps(facts))
    return folder


def test_each_variant_has_its_column(pair: list[Path]) -> None:
    rows = {row[0]: row[1:] for row in variants(pair)}
    own = {row[0]: row[1:] for row in comparison(read_facts(pair[0])["evaluation"])}
    name = read_facts(pair[0])["name"]
    assert rows[""] == ["dense, torch", name, f"{name}, ONNX int8", "tiny | <b>"]
    for label in ("weights on disk", "accuracy", "batch 1, p50 / p95", "batch 1, faster (wall)", "KL(dense, it)"):
        dense, _, root, onnx = own[label]
        assert rows[label][:3] == [dense, root, onnx]
    assert rows["weights on disk"][3] == "10.0 MB"
    assert rows["accuracy"][3] == "75.12%"
    assert rows["batch 1, p50 / p95"][3] == rows["batch 1, faster (cpu)"][3] == "-"
    turned = {row[0]: row[1:] for row in variants(pair[::-1])}  # what the first has no figure of is not passed over
    assert turned["batch 1, p50 / p95"][1:3] == ["-", rows["batch 1, p50 / p95"][1]]


def test_as_markdown_with_places(pair: list[Path]) -> None:
    card = variants_card(pair)
    assert "|---|---:|---:|---:|---:|" in card
    assert "tiny &#124; &#60;b&#62;" in card
    assert "([alice/tiny](https://huggingface.co/alice/tiny)): `finetune`, then `shrink`" in card
    assert "(not published)" in card


def test_what_cannot_be_compared(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no comparison"):
        variants(pair[:1])
    with pytest.raises(CompressError, match="same dense model"):
        variants([pair[0], ROOT / "smollm2-sparse"])
    facts = read_facts(pair[0])
    facts["evaluation"]["artefacts"]["dense"]["accuracy"]["n"] += 1
    with pytest.raises(CompressError, match="same dense model"):
        variants([pair[0], write(tmp_path / "other", facts)])
    with pytest.raises(CompressError, match="nothing was measured"):
        variants([pair[0], write(tmp_path / "none", facts | {"evaluation": None})])
