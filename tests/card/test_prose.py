"""What a person writes into a card stays; what is made from the facts is made again."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.card.prose import merge, prose_of, sections_of


def card(*sections: str, **data: object) -> str:
    front = yaml.safe_dump({"license": "mit", "tags": ["hf-compress"]} | data, sort_keys=False)
    made = "\n".join(
        f"<!-- hf_compress: {name}, made from hf_compress.json -->\n## {name}\n<!-- hf_compress: end -->\n"
        for name in sections
    )
    return f"---\n{front}---\n{made}"


def test_an_untouched_card_is_replaced() -> None:
    new = card("summary", "limits")
    assert prose_of(new) == ""
    assert merge(new, card("summary", "limits")) == new
    assert sections_of(merge(new.replace("## limits", "## limits, new"), new))["limits"].count("## limits, new") == 1


def test_prose_stays_where_it_was_written() -> None:
    old = card("summary", "limits").replace(
        "## summary\n<!-- hf_compress: end -->\n", "## summary\n<!-- hf_compress: end -->\nMine.\n"
    )
    merged = merge(card("summary", "limits").replace("## limits", "## limits, new"), old)
    assert merged == old.replace("## limits", "## limits, new")
    assert "Mine." in prose_of(merged)


def test_sections_come_and_go() -> None:
    old = card("summary", "done", "limits") + "\nLast words.\n"
    merged = merge(card("summary", "use", "limits"), old)
    assert list(sections_of(merged)) == ["summary", "use", "limits"]
    assert merged.endswith("Last words.\n")
    assert list(sections_of(merge(card("first", "summary"), card("summary")))) == ["first", "summary"]


def test_metadata_of_a_person_stays_and_ours_is_renewed() -> None:
    old = card("summary", license="apache-2.0", language="en", tags=["films", "hf-compress"], base_model="a/old")
    data = yaml.safe_load(merge(card("summary", tags=["hf-compress", "prune"]), old).split("---\n")[1])
    assert data == {"license": "mit", "language": "en", "tags": ["hf-compress", "prune", "films"]}


def test_a_foreign_card_is_kept_after_ours() -> None:
    merged = merge(card("summary"), "---\nlanguage: de\n---\n# Mein Modell\n\nText.\n")
    assert list(sections_of(merged)) == ["summary"]
    assert merged.endswith("# Mein Modell\n\nText.\n")
    assert merge(card("summary"), merged) == merged
    broken = "---\nlicense: [\n---\n# x\n"
    assert "license: [" in merge(card("summary"), broken)


@given(st.text(alphabet="ab#-<!>\n hf_compress:end", max_size=60), st.permutations(["summary", "use", "limits"]))
def test_merging_again_changes_nothing(prose: str, order: list[str]) -> None:
    once = merge(card("summary", "use", "limits"), card(*order) + prose)
    assert merge(card("summary", "use", "limits"), once) == once
    assert prose.strip() in once
