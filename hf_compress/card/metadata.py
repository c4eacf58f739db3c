"""The card's front matter and `.eval_results/`, by the Hub's conventions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_compress.card.escape import HUB_ID, one_line

PIPELINES = {"causal-lm": "text-generation", "text-classification": "text-classification"}
METRICS = ("accuracy", "perplexity")


def metadata(facts: dict[str, Any]) -> dict[str, Any]:
    """library_name, pipeline_tag, license, base_model, datasets, metrics, tags and model-index; what is not known is
    left out."""
    base = facts["base_model"] if HUB_ID.fullmatch(facts["base_model"] or "") else None
    licence = facts["license"] or {}
    named = licence.get("id") == "other"
    known = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES[facts["task"]],
        "license": licence.get("id"),
        "license_name": (licence.get("name") or "as-the-source") if named else None,
        "license_link": licence.get("link") if named else None,
        "base_model": base,
        "base_model_relation": ("quantized" if facts["container"] else "finetune") if base else None,
        "datasets": [d for d in facts["datasets"] if HUB_ID.fullmatch(d)] or None,
        "metrics": [m for m in METRICS if m in root_of(facts)] or None,
        "tags": ["hf-compress", *sorted({s["kind"] for s in facts["stages"]})],
    }
    return {key: value for key, value in known.items() if value is not None} | _model_index(facts)


def root_of(facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the checkpoint at the folder's root; {} when nothing was."""
    found: dict[str, Any] = facts["evaluation"]["artefacts"]["root"] if facts["evaluation"] else {}
    return found


def _model_index(facts: dict[str, Any]) -> dict[str, Any]:
    """What the Hub shows beside the card: the measured quality of the root checkpoint."""
    root = root_of(facts)
    results = [
        EvalResult(
            task_type=PIPELINES[facts["task"]],
            dataset_type=dataset if HUB_ID.fullmatch(dataset) else re.sub(r"[^\w.-]", "-", Path(dataset).stem),
            dataset_name=one_line(Path(dataset).stem),
            metric_type=metric,
            metric_value=round(root[metric]["value"], 4),
            metric_name=f"{metric} (held-out rows; see the card for n and the interval)",
        )
        for metric in METRICS
        if metric in root
        for dataset in facts["datasets"][:1]
    ]
    return {"model-index": eval_results_to_model_index(one_line(facts["name"]), results)} if results else {}


def eval_results(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of ``.eval_results/*.yaml``, where the rows came from a dataset on the Hub; [] otherwise."""
    root, data = root_of(facts), (facts.get("recipe") or {}).get("data") or {}
    found: list[dict[str, Any]] = eval_result_entries_to_yaml(
        [
            EvalResultEntry(
                dataset_id=dataset,
                task_id=data.get("config") or "default",
                value=root[metric]["value"],
                dataset_revision=data.get("revision"),
                date=facts["date"],
                notes=f"{metric} on {root[metric]['n']} held-out rows",
            )
            for dataset in facts["datasets"]
            if HUB_ID.fullmatch(dataset)
            for metric in METRICS
            if metric in root
        ]
    )
    return found
