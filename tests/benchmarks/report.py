"""Facts of a benchmark as results/NAME.json, and README.md rendered from all of them.

python tests/benchmarks/report.py      # renders README.md again
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def figure(name: str, value: float, target: str, reached: bool, *, spread: Iterable[float] = ()) -> dict[str, Any]:
    """One line of the table; `spread` holds the single values that `value` summarises."""
    return {"name": name, "value": value, "target": target, "reached": reached, "spread": list(spread)}


def record(name: str, *, what: str, command: str, figures: list[dict[str, Any]], **facts: Any) -> None:
    """Write the result (`facts` are what it was computed from) and render README.md.

    `tables` among the facts (title, columns, rows of text) and results/NAME.png are shown too.
    """
    from hf_compress.evaluation.cost import machine_facts

    found = {"what": what, "command": command, "date": time.strftime("%Y-%m-%d"), "figures": figures}
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found | {"machine": machine_facts()} | facts, indent=2) + "\n")
    render()


def render() -> None:
    lines = [
        "# Benchmarks",
        "",
        "Written by `report.py` from `results/`; do not edit. Each script says how it measures.",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        facts = json.loads(path.read_text())
        machine = facts["machine"]
        lines += ["", f"## {path.stem}", "", facts["what"], "", f"    {facts['command']}", ""]
        lines += ["| figure | value | spread | target | reached |", "|---|---|---|---|---|"]
        for one in facts["figures"]:
            spread = f"{min(one['spread']):.4g} to {max(one['spread']):.4g}" if one["spread"] else "-"
            reached = "-" if one["target"] == "-" else "yes" if one["reached"] else "**no**"
            lines.append(f"| {one['name']} | {one['value']:.4g} | {spread} | {one['target']} | {reached} |")
        for table in facts.get("tables", []):
            lines += ["", table["title"], "", "| " + " | ".join(table["columns"]) + " |"]
            lines += ["|---" * len(table["columns"]) + "|", *("| " + " | ".join(row) + " |" for row in table["rows"])]
        if path.with_suffix(".png").exists():
            lines += ["", f"![{path.stem}](results/{path.stem}.png)"]
        lines += ["", f"{facts['date']}, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "]
        lines[-1] += f"transformers {machine['transformers']}."
    (HERE / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    render()
