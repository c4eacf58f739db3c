"""The picture of `pruning_schedules.py`: quality and KL to the dense model against sparsity, with 95% intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from schedules_arm import SCHEDULES, UNTRAINED

COLOURS = dict(zip(SCHEDULES, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True)) | {UNTRAINED: "black"}


def line(axes: Axes, curve: dict[str, Any], measure: str, places: dict[float, int], shift: float) -> None:
    """One arm over its sparsities, moved a little to the side so that intervals do not hide one another."""
    points = sorted((float(sparsity), found[measure]) for sparsity, found in curve["at"].items())
    values = [point["value"] for _, point in points]
    around = [
        [point["value"] - point["low"] for _, point in points],
        [point["high"] - point["value"] for _, point in points],
    ]
    trained = curve["schedule"] != UNTRAINED
    axes.errorbar(
        [places[sparsity] + shift for sparsity, _ in points],
        values,
        yerr=around,
        color=COLOURS[curve["schedule"]],
        linestyle=("-" if curve["distilled"] else "--") if trained else ":",
        marker=("o" if curve["distilled"] else "s") if trained else "x",
        markersize=4,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2,
    )


def draw(curves: dict[str, list[dict[str, Any]]], dense: dict[str, float], path: Path) -> None:
    """Two panels a task. curves: task -> its arms, each with `at`: sparsity -> {score, kl} -> value, low, high."""
    names = {
        "rotten-tomatoes": ("Rotten Tomatoes, MiniLM", "accuracy, %"),
        "text": ("reviews, DeepSeek-V3-8M", "perplexity"),
    }
    figure, grid = plt.subplots(len(curves), 2, figsize=(12, 4.6 * len(curves)), squeeze=False)
    for row, (task, some) in zip(grid, curves.items(), strict=True):
        sparsities = sorted({float(sparsity) for curve in some for sparsity in curve["at"]})
        places = {sparsity: place for place, sparsity in enumerate(sparsities)}
        title, score = names[task]
        for axes, measure, label in zip(
            row, ("score", "kl"), (score, "KL(dense, pruned), nats a prediction"), strict=True
        ):
            for index, curve in enumerate(some):
                line(axes, curve, measure, places, 0.05 * (index - (len(some) - 1) / 2))
            if measure == "score":
                axes.axhline(dense[task], color="grey", linewidth=1)
                axes.annotate(
                    "dense", (0.01, dense[task]), xycoords=("axes fraction", "data"), va="bottom", color="grey"
                )
            if measure == "kl" or task == "text":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(list(places.values()), [f"{sparsity:.0%}" for sparsity in sparsities])
            axes.set(xlabel="share of zeros", ylabel=label, title=title)
            axes.grid(alpha=0.25)
    present = {curve["schedule"] for some in curves.values() for curve in some}
    shown = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items() if name in present]
    shown += [
        Line2D(
            [], [], color="grey", linestyle="-", marker="o", markersize=4, label="learns the dense model's answers"
        ),
        Line2D([], [], color="grey", linestyle="--", marker="s", markersize=4, label="learns the labels"),
    ]
    figure.legend(handles=shown, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
