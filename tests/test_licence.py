"""A licence is inherited, never invented."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_compress.card import read_facts, render_card
from hf_compress.errors import CompressError
from hf_compress.licence import copy_texts, source_licence
from hf_compress.source import ModelSource

CARDS = Path(__file__).parents[1] / "model_cards"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path / "base"


def test_what_the_sources_card_says(base: Path) -> None:
    out = base.parent / "out"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE.md\n---\n")
    (base / "LICENSE.md").write_text("Be kind.")
    (base / "NOTICE").write_text("By us.")
    found = source_licence(ModelSource(id=str(base)), None)
    assert found == {
        "id": "other",
        "name": "tiny-1",
        "link": "LICENSE.md",
        "files": ["LICENSE.md", "NOTICE"],
        "origin": "source",
    }
    copy_texts(ModelSource(id=str(base)), found, out)
    assert (out / "LICENSE.md").read_text() == "Be kind."
    card = render_card(read_facts(CARDS / "quickstart") | {"license": found})
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny-1", "LICENSE.md")
    assert "tiny-1, inherited from the model it was made from" in card
    assert "[LICENSE.md](LICENSE.md), [NOTICE](NOTICE)" in card


def test_what_nobody_says_is_unknown(base: Path) -> None:
    assert source_licence(ModelSource(id=str(base)), None) is None
    assert source_licence(ModelSource(config={"model_type": "bert"}), None) is None
    card = render_card(read_facts(CARDS / "quickstart") | {"license": None})
    assert "Unknown: neither the model" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


def test_the_recipe_may_state_what_the_source_does_not_say(base: Path) -> None:
    found = source_licence(ModelSource(id=str(base)), "mit")
    assert found is not None
    assert (found["id"], found["origin"]) == ("mit", "recipe")
    assert "as the recipe states it" in render_card(read_facts(CARDS / "quickstart") | {"license": found})


def test_the_recipe_may_not_contradict_the_source(base: Path) -> None:
    (base / "README.md").write_text("---\nlicense: llama3\n---\n")
    with pytest.raises(CompressError, match="'mit', the model itself 'llama3'"):
        source_licence(ModelSource(id=str(base)), "mit")


@pytest.mark.parametrize("front", ["license: [a]", "license: '<b>x y</b>'", "license: [", "license: {a: b}"])
def test_hostile_licences_are_not_taken_over(front: str, base: Path) -> None:
    (base / "README.md").write_text(f"---\n{front}\n---\n")
    assert source_licence(ModelSource(id=str(base)), None) is None
