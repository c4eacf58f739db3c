"""The card's plots, drawn from the facts: blocks, losses, trade-off."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress.card.comparison import LABELS
from hf_compress.card.metadata import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "plots"


def draw_plots(facts: dict[str, Any], folder: Path) -> list[str]:
    """Write the PNG files that the facts have figures for into ``folder/plots`` and name them; [] without matplotlib.

    blocks: bits a weight and share of zeros, block by block. losses: each training stage's loss and its terms.
    tradeoff: megabytes against quality with its interval, where there are more than two variants.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    drawn = []
    for name, has, draw in _PLOTS:
        rows = has(facts)
        if rows:
            (folder / FOLDER).mkdir(exist_ok=True)
            _save(folder / FOLDER / f"{name}.png", rows, draw)
            drawn.append(name)
    return drawn


def _save(path: Path, rows: list[Any], draw: Callable[[Axes, Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(rows), 3.4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        draw(axes, row)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _has_blocks(facts: dict[str, Any]) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """(axis label, kind -> points) of each panel."""
    panels = []
    for key, label in (("bits", "bits a weight, with scales"), ("zeros", "share of zeros")):
        lines: dict[str, list[tuple[int, float]]] = {}
        for entry in facts.get("blocks", []):
            if entry[key] is not None:
                lines.setdefault(entry["kind"], []).append((entry["block"], entry[key]))
        if lines:
            panels.append((label, lines))
    return panels


def _draw_blocks(axes: Axes, panel: tuple[str, dict[str, list[tuple[int, float]]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    label, lines = panel
    for size, (kind, points) in zip((9, 7, 5, 3), lines.items(), strict=False):  # rings inside one another
        axes.plot(*zip(*points, strict=True), "o-", mfc="none", label=kind.replace("_", " "), ms=size, linewidth=1)
    highest = max(value for points in lines.values() for _, value in points)
    axes.set(xlabel="block", ylabel=label, ylim=(0, 1.3 * highest or 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)


def _has_losses(facts: dict[str, Any]) -> list[tuple[str, list[dict[str, float]]]]:
    found = ((s["name"], s["facts"].get("log", [])) for s in facts["stages"] if s["kind"] == "train")
    return [(name, log) for name, log in found if sum("loss" in entry for entry in log) > 1]


def _draw_losses(axes: Axes, stage: tuple[str, list[dict[str, float]]]) -> None:
    name, log = stage
    keys = sorted({k for entry in log for k in entry if k in ("loss", "eval_loss") or k.startswith("loss_")})
    for key in keys:
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        same = key.startswith("loss_") and all(entry.get("loss") == entry[key] for entry in log if key in entry)
        if any(value for _, value in points) and not same:  # a term of weight zero, or the only one, is no curve
            style = "k-" if key == "loss" else "o--" if key == "eval_loss" else "--"
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), ms=3, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None), title=_plain(name))
    axes.title.set_fontsize(9)
    axes.legend(frameon=False, fontsize=8)


def _has_tradeoff(facts: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    found = facts["evaluation"]["artefacts"] if facts["evaluation"] else {}
    for metric in METRICS:
        points = {name: a for name, a in found.items() if metric in a and "bytes" in a}
        if len(points) > 2:
            return [(metric, points)]
    return []


def _draw_tradeoff(axes: Axes, row: tuple[str, dict[str, dict[str, Any]]]) -> None:
    """Each variant with the interval of its paired difference to the dense model."""
    from matplotlib.ticker import PercentFormatter

    metric, points = row
    dense = points["dense"][metric]["value"]
    for name, artefact in points.items():
        value, change = artefact[metric]["value"], artefact.get(f"{metric}_difference")
        ends = []
        if change is not None:
            ends = [dense + change[k] if metric == "accuracy" else dense * change[k] for k in ("low", "high")]
        spread = [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]] if ends else None
        axes.errorbar(artefact["bytes"] / 1e6, value, yerr=spread, fmt="o", capsize=3, label=LABELS[name])
    axes.set(xlabel="weights on disk, MB", ylabel=metric, xlim=(0, None))
    axes.set_title("bars: 95% interval of the paired difference to dense", fontsize=8)
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.legend(frameon=False, fontsize=8)


def _plain(name: str) -> str:
    """Without what matplotlib would read as mathematics."""
    return name.replace("$", r"\$")


_PLOTS: list[tuple[str, Callable[[dict[str, Any]], list[Any]], Callable[[Any, Any], None]]] = [
    ("blocks", _has_blocks, _draw_blocks),
    ("losses", _has_losses, _draw_losses),
    ("tradeoff", _has_tradeoff, _draw_tradeoff),
]
