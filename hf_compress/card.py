"""The model card, from the finished folder alone: every number in it was measured and stands in hf_compress.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_compress.errors import CompressError

FACTS = "hf_compress.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINES = {"causal-lm": "text-generation", "text-classification": "text-classification"}
LABELS = {
    "dense": "dense, torch",
    "plain_onnx": "dense, plain ONNX int8",
    "root": "ours, torch",
    "onnx": "ours, ONNX int8",
}


def read_facts(folder: Path) -> dict[str, Any]:
    """What `compress` recorded of a finished folder.

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


def write_card(folder: Path) -> Path:
    """Render ``README.md`` from ``hf_compress.json``; can be run again at any time."""
    facts = read_facts(folder)
    path = folder / "README.md"
    path.write_text(render_card(facts))
    return path


def render_card(facts: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML front matter. Text from the recipe is escaped, so that a name cannot break out of
    its place."""
    facts = _without_folders(facts)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"text": _text, "code": _code}
    template = environment.from_string((Path(__file__).parent / "card_template.md").read_text())
    recipe = yaml.safe_dump(facts["recipe"], sort_keys=False)
    fence = "`" * (max((len(run) for run in re.findall("`+", recipe)), default=2) + 3)
    return template.render(
        front=yaml.safe_dump(_metadata(facts), sort_keys=False),
        facts=facts,
        table=comparison(facts["evaluation"]),
        recipe=recipe,
        fence=fence,
        stages=list(zip(facts["stages"], map(_options, facts["recipe"]["stages"]), strict=True)),
        trained=any(s["kind"] == "train" for s in facts["stages"]),
        few=_few(facts),
        timed="latency" in _root(facts),
        smaller_than_source=_against_source(facts),
        auto=("AutoModelForCausalLM" if facts["task"] == "causal-lm" else "AutoModelForSequenceClassification"),
        masked=any(s["kind"] == "prune" or "Pruning" in (s["facts"].get("techniques") or {}) for s in facts["stages"]),
        onnx=any(s["kind"] == "export" for s in facts["stages"]),
    )


def _root(facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the checkpoint at the folder's root; {} when nothing was."""
    found: dict[str, Any] = facts["evaluation"]["artefacts"]["root"] if facts["evaluation"] else {}
    return found


def _against_source(facts: dict[str, Any]) -> str:
    """Bytes against the source's own files where these are not the dense model of the table (FP8, GGUF); else ""."""
    root = _root(facts)
    source, dense = facts.get("source_bytes"), facts["evaluation"] and facts["evaluation"]["artefacts"]["dense"]
    if not source or "bytes" not in root or abs(source / dense["bytes"] - 1) < 0.01:
        return ""
    return f"{source / 1e6:.1f} MB, so this folder's are {source / root['bytes']:.2f}x smaller than those."


def comparison(evaluation: dict[str, Any] | None) -> list[list[str]]:
    """Rows of the before/after table, the header first; [] without an evaluation. Used by the card and the terminal
    alike."""
    if evaluation is None:
        return []
    found: dict[str, dict[str, Any]] = evaluation["artefacts"]
    names = [name for name in LABELS if name in found]
    rows = [["", *(LABELS[name] for name in names)]]

    def row(label: str, value: Any) -> None:
        cells = [value(found[name], name) for name in names]
        if any(cells):
            rows.append([label, *(cell or "-" for cell in cells)])

    dense = found["dense"]
    row("weights on disk", lambda a, n: "bytes" in a and f"{a['bytes'] / 1e6:.1f} MB")
    row("times smaller", lambda a, n: "bytes" in a and n != "dense" and f"{dense['bytes'] / a['bytes']:.2f}x")
    row("parameters", lambda a, n: "parameters" in a and f"{a['parameters'] / 1e6:.1f} M")
    row(
        "active parameters",
        lambda a, n: a.get("active_parameters") != a.get("parameters") and f"{a['active_parameters'] / 1e6:.1f} M",
    )
    row("memory after a forward", lambda a, n: "memory_mb" in a and f"{a['memory_mb']:.0f} MiB")
    row("zeros in block matrices", lambda a, n: a.get("sparsity") is not None and f"{a['sparsity']:.1%}")
    for size in dense.get("latency", {}):
        row(
            f"batch {size}, p50 / p95",
            lambda a, n, s=size: "{median:.2f} / {p95:.2f} ms".format(**a["latency"][s]["wall_ms"]),
        )
        row(f"batch {size}, rows / s", lambda a, n, s=size: f"{a['latency'][s]['rows_per_second']:.0f}")
        for clock in ("wall", "cpu"):
            row(
                f"batch {size}, faster ({clock})",
                lambda a, n, s=size, c=clock: (
                    n != "dense" and "{median:.2f}x ({low:.2f}-{high:.2f})".format(**a["latency"][s][f"speedup_{c}"])
                ),
            )
    row("accuracy", lambda a, n: "accuracy" in a and f"{a['accuracy']['value']:.2%}")
    row("rows measured", lambda a, n: "accuracy" in a and str(a["accuracy"]["n"]))
    row(
        "accuracy - dense, points",
        lambda a, n: (
            "accuracy_difference" in a
            and "{:+.2f} ({:+.2f}, {:+.2f})".format(
                *(100 * a["accuracy_difference"][k] for k in ("value", "low", "high"))
            )
        ),
    )
    row("perplexity", lambda a, n: "perplexity" in a and f"{a['perplexity']['value']:.2f}")
    row("tokens measured", lambda a, n: "perplexity" in a and str(a["perplexity"]["tokens"]))
    row(
        "perplexity / dense",
        lambda a, n: (
            "perplexity_difference" in a and "{value:.3f} ({low:.3f}, {high:.3f})".format(**a["perplexity_difference"])
        ),
    )
    row("KL(dense, it)", lambda a, n: "kl_to_dense" in a and f"{a['kl_to_dense']:.4f}")
    row("same top answer as dense", lambda a, n: "agreement" in a and f"{a['agreement']:.2%}")
    return rows


def _metadata(facts: dict[str, Any]) -> dict[str, Any]:
    base = facts["base_model"] if HUB_ID.fullmatch(facts["base_model"] or "") else None
    tags = ["hf-compress", *sorted({s["kind"] for s in facts["stages"]})]
    known = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES[facts["task"]],
        "license": facts["license"],
        "base_model": base,
        "base_model_relation": ("quantized" if facts["container"] else "finetune") if base else None,
        "datasets": [d for d in facts["datasets"] if HUB_ID.fullmatch(d)] or None,
        "tags": tags,
    }
    return {key: value for key, value in known.items() if value is not None} | _model_index(facts)


def _model_index(facts: dict[str, Any]) -> dict[str, Any]:
    """What the Hub shows beside the card: the measured quality of the root checkpoint."""
    root = _root(facts)
    results = [
        EvalResult(
            task_type=PIPELINES[facts["task"]],
            dataset_type=dataset if HUB_ID.fullmatch(dataset) else Path(dataset).stem,
            dataset_name=Path(dataset).stem,
            metric_type=metric,
            metric_value=round(root[metric]["value"], 4),
            metric_name=f"{metric} (held-out rows; see the card for n and the interval)",
        )
        for metric in ("accuracy", "perplexity")
        if metric in root
        for dataset in facts["datasets"][:1]
    ]
    return {"model-index": eval_results_to_model_index(" ".join(facts["name"].split()), results)} if results else {}


def _options(entry: Any) -> str:
    """A stage's options as the recipe gives them, on one line."""
    options = next((v for k, v in entry.items() if k != "name"), None) if isinstance(entry, dict) else None
    return yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6).strip() if options else ""


def _few(facts: dict[str, Any]) -> int | None:
    """How many rows quality was measured on, when too few to tell."""
    root = _root(facts)
    rows: int | None = next((root[name]["n"] for name in ("accuracy", "perplexity") if name in root), None)
    return rows if rows is not None and rows < 30 else None


def _code(value: str) -> str:
    """An inline code span, whatever backticks are inside."""
    line = " ".join(value.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _without_folders(facts: Any) -> Any:
    """Absolute paths by their last name: where things lay on the maker's machine is nobody's business."""
    if isinstance(facts, dict):
        return {key: _without_folders(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [_without_folders(value) for value in facts]
    return re.sub(r"(?<![\w:/.~-])/(?:[\w.@+~-]+/)+(?=[\w.@+~-])", "", facts) if isinstance(facts, str) else facts


def _text(value: object) -> str:
    """One line of plain text inside Markdown: no HTML, no table bars, no links, no line breaks."""
    return re.sub(r"([\\`*\[\]<>|#~&]|(?<!\w)_|_(?!\w))", lambda m: f"&#{ord(m[1])};", " ".join(str(value).split()))
