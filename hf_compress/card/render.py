"""Facts -> Markdown: the whole card as if nobody had written into it."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml

from hf_compress.card.citations import bibtex
from hf_compress.card.comparison import comparison
from hf_compress.card.escape import HUB_ID, cell, code, fence_for, hub_link, one_line, text
from hf_compress.card.facts import without_folders
from hf_compress.card.metadata import METRICS, metadata, root_of
from hf_compress.card.snippets import COPIES, snippets

HERE = "."  # the place that snippets load from while the model is not on the Hub


def render_card(facts: dict[str, Any], *, repo: str | None = None, plots: Collection[str] = ()) -> str:
    """Markdown with the Hub's YAML front matter. Text from the recipe is escaped, so that a name cannot break out of
    its place. repo: where it is published; plots: which were drawn."""
    facts = without_folders(facts)
    place = repo if repo and HUB_ID.fullmatch(repo) else HERE
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "text": text,
        "cell": cell,
        "code": code,
        "hub_link": hub_link,
        "line": one_line,
        "url": quote,
    }
    facts = {"in_progress": None, "new_weights": [], "source_format": None} | facts
    template = environment.from_string((Path(__file__).parent / "template.md").read_text())
    recipe = dump_recipe(facts)
    card = template.render(
        front=yaml.safe_dump(metadata(facts), sort_keys=False),
        facts=facts,
        origin=_origin(facts),
        gist=_gist(facts),
        table=comparison(facts["evaluation"]),
        recipe="" if "<!--" in recipe else recipe,  # it would be taken for one of the card's own marks
        fence=fence_for(recipe),
        stages=list(zip(facts["stages"], _options(facts), map(_chosen, facts["stages"]), strict=True)),
        trained=any(s["kind"] == "train" for s in facts["stages"]),
        few=_few(facts),
        timed="latency" in root_of(facts),
        smaller_than_source=_against_source(facts),
        masked=_masked(facts),
        no_gain=_no_gain(facts),
        copies=[copy for copy in COPIES if any(name.startswith(f"{copy}/") for name in facts["files"])],
        runtimes=COPIES,
        onnx_size=_onnx_size(facts),
        plots=plots,
        drawable=importlib.util.find_spec("matplotlib") is not None,
        snippets=snippets(facts, place=place),
        place=place,
        last_evaluation=_last_evaluation(facts),
        selection=_selection(facts),
        bibtex=bibtex(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", card.lstrip("\n"))


def dump_recipe(facts: dict[str, Any]) -> str:
    """The recipe (of a script: its TrainingArguments) as YAML, without the folders of the maker's machine."""
    known = facts.get("recipe") or facts.get("training_arguments") or {}
    return yaml.safe_dump(without_folders(known), sort_keys=False, allow_unicode=True)


def _origin(facts: dict[str, Any]) -> str:
    base = facts["base_model"] or "A model trained from a config"
    if HUB_ID.fullmatch(base):
        return hub_link(base)
    return text(
        f"{base.removeprefix('package://').split('/')[0]} (a Python package)" if "package://" in base else base
    )


def _onnx_size(facts: dict[str, Any]) -> str:
    """(17.3 MB), where it was measured."""
    copy = facts["evaluation"]["artefacts"].get("onnx", {}) if facts["evaluation"] else {}
    return f" ({copy['bytes'] / 1e6:.1f} MB)" if "bytes" in copy else ""


def _gist(facts: dict[str, Any]) -> str:
    """The second sentence: how small, how good."""
    root = root_of(facts)
    dense = facts["evaluation"]["artefacts"]["dense"] if facts["evaluation"] else {}
    said = []
    if "bytes" in root:
        ours, theirs = (f"{x['bytes'] / 1e6:.1f}\u00a0MB" for x in (root, dense))
        said.append(f"Its weights take {ours}, the dense model's {theirs}")
    for metric, form in zip(METRICS, ("{:.2%}", "{:.2f}"), strict=True):
        if metric in root:
            ours, theirs = (form.format(x[metric]["value"]) for x in (root, dense))
            said.append(f"{'its ' if said else 'Its '}{metric} is {ours}, the dense model's {theirs}")
    return "; ".join(said) + "." if said else "Its answers were compared with the model in memory only."


def _against_source(facts: dict[str, Any]) -> str:
    """Bytes against the source's own files where these are not the dense model of the table (FP8, GGUF); else ""."""
    root = root_of(facts)
    source, dense = facts.get("source_bytes"), facts["evaluation"] and facts["evaluation"]["artefacts"]["dense"]
    if not source or "bytes" not in root or abs(source / dense["bytes"] - 1) < 0.01:
        return ""
    ratio = source / root["bytes"]
    than = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
    return f"{source / 1e6:.1f} MB; this folder's are {than} than those."


def _options(facts: dict[str, Any]) -> list[str]:
    """Each stage's options on one line, as the recipe below gives them but without how long it trained and on what;
    nothing for a script's."""
    entries = (facts.get("recipe") or {}).get("stages") or [None] * len(facts["stages"])
    return [_one_line_options(entry) for entry in entries]


def _chosen(stage: dict[str, Any]) -> str:
    """How many parts of the model a budget gave how many bits; "" without one."""
    found = stage["facts"].get("allocation")
    if found is None:
        return ""
    each = Counter(found["bits"].values())
    said = ", ".join(f"{bits} bits for {count} part{'s' if count > 1 else ''}" for bits, count in sorted(each.items()))
    return (
        f"chosen under the budget, {found['average_bits']:.2f} bits a weight with scales: {said} (matrices that read "
        "one input, or all experts; `hf_compress.json` names them)"
    )


def _one_line_options(entry: Any) -> str:
    options = next((v for k, v in entry.items() if k != "name"), None) if isinstance(entry, dict) else None
    if isinstance(options, dict):
        options = {key: value for key, value in options.items() if key not in ("args", "extra_data")}
    return yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6).strip() if options else ""


def _few(facts: dict[str, Any]) -> int | None:
    """How many rows quality was measured on, when too few to tell."""
    root = root_of(facts)
    rows: int | None = next((root[name]["n"] for name in METRICS if name in root), None)
    return rows if rows is not None and rows < 30 else None


def _last_evaluation(facts: dict[str, Any]) -> str:
    """What the Trainer logged last of its evaluation set, where nothing was measured against the dense model."""
    logs = [entry for s in facts["stages"] for entry in s["facts"].get("log", []) if "eval_loss" in entry]
    if facts["evaluation"] or not logs:
        return ""
    quiet = ("_runtime", "_per_second")
    kept = {k: v for k, v in logs[-1].items() if k.startswith("eval_") and not k.endswith(quiet)}
    return ", ".join(f"{key} {value:.4g}" for key, value in kept.items()) + f" at step {logs[-1]['step']}"


def _masked(facts: dict[str, Any]) -> bool:
    return any(s["kind"] == "prune" or "Pruning" in (s["facts"].get("techniques") or {}) for s in facts["stages"])


def _no_gain(facts: dict[str, Any]) -> bool:
    """Nothing was removed for real, and the container brings transformers no kernel."""
    cut = any(s["kind"] == "shrink" for s in facts["stages"])
    return not cut and (facts["container"] is None or facts["container"]["speed"].startswith("no gain"))


def _selection(facts: dict[str, Any]) -> str:
    """Which rows of the dataset: its configuration and filter."""
    data = (facts.get("recipe") or {}).get("data") or {}
    parts = [str(data["config"])] if data.get("config") else []
    return ", ".join([*parts, *(f"{column} = {value}" for column, value in (data.get("filter") or {}).items())])
