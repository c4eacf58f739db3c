"""The card of a folder, on disk: README.md, recipe.yaml, plots and evaluation results, written from the facts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from hf_compress.card.facts import FACTS, read_facts, save_facts
from hf_compress.card.metadata import eval_results
from hf_compress.card.plots import draw_plots
from hf_compress.card.prose import merge, prose_of, sections_of
from hf_compress.card.render import dump_recipe, render_card
from hf_compress.errors import CompressError
from hf_compress.files import write_whole


def write_card(folder: Path, *, repo: str | None = None) -> Path:
    """Write ``README.md``, ``recipe.yaml``, ``plots/`` and ``.eval_results/`` from ``hf_compress.json``; can be run
    again at any time. Prose that a person added to README.md stays.

    repo: the id on the Hub that the snippets load from; the one it was published to when none is given.
    """
    facts, path = read_facts(folder), folder / "README.md"
    plots = draw_plots(facts, folder)
    card = render_card(facts, repo=repo or facts.get("published", {}).get("repo"), plots=plots)
    write_whole(path, merge(card, path.read_text()) if path.exists() else card)
    if facts.get("recipe"):
        write_whole(folder / "recipe.yaml", dump_recipe(facts))
    results = eval_results(facts)
    if results:
        (folder / ".eval_results").mkdir(exist_ok=True)
        write_whole(folder / ".eval_results" / "hf_compress.yaml", yaml.safe_dump(results, sort_keys=False))
    return path


def adopt_prose(folder: Path, remote: str | None) -> None:
    """Take over what a person wrote into the published card (`remote`), where nothing was written here since.

    Raises:
        CompressError: prose was written both here and there.
    """
    path = folder / "README.md"
    here, there = prose_of(path.read_text()), prose_of(remote or "")
    if remote is None or not there or here == there:
        return
    known = read_facts(folder).get("published", {}).get("prose")
    if not here or _digest(here) == known:
        write_whole(path, merge(path.read_text(), remote))
    elif _digest(there) != known:
        raise CompressError(
            "the card was written into both here and on the Hub",
            where=str(path),
            next_step="copy the Hub's text into this README.md, or take yours out, then publish again",
        )


def differing_sections(folder: Path, *, repo: str | None = None) -> list[str]:
    """Sections of README.md with measured numbers that are not what the facts give; [] when all are."""
    facts = read_facts(folder)
    plots = [path.stem for path in (folder / "plots").glob("*.png")]
    made = render_card(facts, repo=repo or facts.get("published", {}).get("repo"), plots=plots)
    here, there = sections_of((folder / "README.md").read_text()), sections_of(made)
    return [name for name in ("summary", "comparison", "limits") if here.get(name) != there.get(name)]


def note_published(folder: Path, repo: str) -> None:
    """Remember where the folder went and the prose it had, for the next time; stays on this machine."""
    prose = _digest(prose_of((folder / "README.md").read_text()))
    save_facts(read_facts(folder) | {"published": {"repo": repo, "prose": prose}}, folder / FACTS)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
