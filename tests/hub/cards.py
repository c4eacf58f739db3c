"""What the Hub checks of a card's metadata before it takes a commit, as far as its public documentation says."""

from __future__ import annotations

import re
from typing import Any

import yaml

LICENCES = {
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0"),
    *("bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "llama2", "llama3"),
    *("llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "deepfloyd-if-license", "unknown", "other"),
}
PIPELINES = {"text-generation", "text-classification", "fill-mask", "feature-extraction"}
RELATIONS = {"quantized", "finetune", "adapter", "merge"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def problems_of_card(text: str) -> list[str]:
    """Why the Hub would refuse this README.md; [] when it would not. No front matter is only a warning there."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    return [problem for check in (_names, _results) for problem in check(data)]


def _names(data: dict[str, Any]) -> list[str]:
    found = []
    if "license" in data and data["license"] not in LICENCES:
        found.append(f'"license" must be one of the known ids, not {data["license"]!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        found.append('"license_name" is needed with license: other')
    if data.get("pipeline_tag", "text-generation") not in PIPELINES:
        found.append(f'"pipeline_tag" {data["pipeline_tag"]!r} is unknown')
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        found.append(f'"base_model_relation" {data["base_model_relation"]!r} is unknown')
    for key in ("base_model", "datasets"):
        ids = data.get(key, [])
        for name in ids if isinstance(ids, list) else [ids]:
            if not isinstance(name, str) or not HUB_ID.fullmatch(name):
                found.append(f'"{key}" {name!r} is no Hub id')
    for key in ("tags", "metrics"):
        if not all(isinstance(x, str) for x in data.get(key, [])):
            found.append(f'"{key}" must be words')
    return found


def _results(data: dict[str, Any]) -> list[str]:
    found = []
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            found.append('"model-index[].name" is needed')
        for result in model.get("results", []):
            dataset = result.get("dataset", {})
            if "type" not in result.get("task", {}) or not {"name", "type"} <= dataset.keys():
                found.append('"model-index[].results[]" needs task.type, dataset.name and dataset.type')
            elif not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", str(dataset["type"])):
                found.append(f'"dataset.type" {dataset["type"]!r} is no id')
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("value"), int | float) or not isinstance(metric.get("type"), str):
                    found.append('"metrics[]" need a type and a number')
    return found
