"""Quantization-aware training against rounding after training, at 8, 4, 3 and 2 bits.

    python tests/benchmarks/qat_quality.py --text-model FOLDER --seeds 0

Two tasks, as in pruning_schedules.py: MiniLM on Rotten Tomatoes, fine-tuned as the quickstart recipe does (once, kept
in --output), and a causal model (--text-model, a folder that also holds heldout_reviews.jsonl) on IMDB reviews. Every
attention, FFN and expert matrix has symmetric integers in groups of 32 inputs, as compressed-tensors stores them:

    rtn, gptq        after training: nearest at the largest weight; the solver of this library with its defaults
    QAT              trained on the labels, learned scales
    QAD (, ste)      trained on the dense model's answers alone (forward KL), learned scales (or the largest weight)
    QAD from gptq    as QAD, begun from what gptq makes of the same calibration rows
    torchao QAT      the peer, on the labels: its IntxFakeQuantizeConfig, symmetric, groups of 32. It has no form for
                     stacked experts, so MiniLM only

All that train see the same rows for as many steps, at one learning rate on a cosine that was not tuned for any.
A seed is an order of rows (and of dropout, and of calibration rows). Arms that are done, files of --output, are not
run again. Intervals are 95% bootstrap intervals over held-out rows, paired.
Writes results/qat_quality.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import transformers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from pruning_schedules import Rows, difference, interval, point, rows_of, score
from qat_arm import DENSE, METHODS, PEER, UNTRAINED, Arm, run
from report import HERE, figure, record
from schedules_arm import Task, rotten_tomatoes, text

BITS = (3, 2, 4, 8)  # in the order they are run
ARMS = [*UNTRAINED, *METHODS, PEER]
TASKS = ("rotten-tomatoes", "text")
COLOURS = dict(
    zip(ARMS, ("grey", "black", "tab:orange", "tab:blue", "tab:cyan", "tab:purple", "tab:red"), strict=True)
)
Found = dict[tuple[str, int], list[dict[str, Any]]]
"""Arm and bits -> its facts, a seed each."""


def table(task: Task, points: dict[tuple[str, int], dict[str, Any]], dense: Rows) -> dict[str, Any]:
    classes = task.kind == "text-classification"
    kind = "accuracy in %" if classes else "perplexity"
    title = f"{task.name}: {kind}, dense {score(dense, task):.2f}, and KL to dense"

    def cell(arm: str, bits: int) -> str:
        if (arm, bits) not in points:
            return "-"
        one = points[arm, bits]
        middle = one["score"]
        return f"{middle['value']:.2f} ({middle['low']:.2f} to {middle['high']:.2f}), {one['kl']['value']:.4f}"

    rows = [[arm, *(cell(arm, bits) for bits in sorted(BITS))] for arm in ARMS]
    return {"title": title, "columns": ["arm", *(f"{bits} bits" for bits in sorted(BITS))], "rows": rows}


def comparisons(found: Found, task: Task) -> list[dict[str, Any]]:
    """KL of QAD, from the dense weights and from gptq's, over that of each other arm, and the step of its score."""
    figures = []
    for bits, own in itertools.product(sorted(BITS), ("QAD", "QAD from gptq")):
        for other in [arm for arm in ARMS if arm not in (own, "QAD from gptq")]:
            if (own, bits) not in found or (other, bits) not in found:
                continue
            ours, theirs = rows_of(found[own, bits]), rows_of(found[other, bits])
            pair = interval(ours["kl"], theirs["kl"])
            what = f"{task.name}, {bits} bits: {own} against {other}"
            spread = [pair["low"], pair["high"]]
            aimed = other == PEER and bits in (2, 3)
            target = "<= 0.60 of the peer's" if aimed else "-"
            figures.append(
                figure(f"{what}: KL to dense, ratio", pair["value"], target, pair["value"] <= 0.6, spread=spread)
            )
            apart = difference(theirs, ours, task)
            unit = "accuracy, points" if task.kind == "text-classification" else "perplexity, ratio"
            figures.append(figure(f"{what}: {unit}", apart["value"], "-", True, spread=[apart["low"], apart["high"]]))
    return figures


def draw(measured: dict[str, dict[tuple[str, int], dict[str, Any]]], dense: dict[str, float], path: Path) -> None:
    """Two panels a task: score and KL over bits."""
    picture, grid = plt.subplots(len(measured), 2, figsize=(12, 4.4 * len(measured)), squeeze=False)
    names = {"rotten-tomatoes": ("Rotten Tomatoes, MiniLM", "accuracy, %"), "text": ("reviews", "perplexity")}
    places = {bits: place for place, bits in enumerate(sorted(BITS))}
    for row, (task, points) in zip(grid, measured.items(), strict=True):
        title, label = names[task]
        for axes, measure, what in zip(row, ("score", "kl"), (label, "KL(dense, quantized)"), strict=True):
            for index, arm in enumerate(ARMS):
                some = [(bits, points[arm, bits][measure]) for bits in sorted(BITS) if (arm, bits) in points]
                if not some:
                    continue
                x = [places[bits] + 0.06 * (index - 3) for bits, _ in some]
                y = [one["value"] for _, one in some]
                around = [[o["value"] - o["low"] for _, o in some], [o["high"] - o["value"] for _, o in some]]
                style = "--" if arm in UNTRAINED else "-"
                axes.errorbar(
                    x,
                    y,
                    yerr=around,
                    color=COLOURS[arm],
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=arm,
                )
            if measure == "score":
                axes.axhline(dense[task], color="green", linewidth=1, label="dense")
            if measure == "kl" or task == "text":
                axes.set_yscale("log")
            axes.set_xticks(list(places.values()), [f"{bits} bits" for bits in places])
            axes.set(ylabel=what, title=title)
            axes.grid(alpha=0.25)
    handles, labels = grid[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    picture.tight_layout(rect=(0, 0.05, 1, 1))
    picture.savefig(path, dpi=110)
    plt.close(picture)


def order(seeds: list[int]) -> list[Arm]:
    """All arms, what matters most first: a run that is stopped has the more."""
    arms = [Arm(task, arm, bits, seed) for seed in seeds for bits in BITS for task in TASKS for arm in ARMS]
    return [Arm(task, DENSE, 32, 0) for task in TASKS] + [a for a in arms if a.method != PEER or a.task != "text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-model", type=Path, required=True, help="causal model with its heldout_reviews.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="of every trained arm on Rotten Tomatoes")
    parser.add_argument("--text-steps", type=int, default=40, help="of every trained arm on text")
    parser.add_argument("--report", action="store_true", help="of the arms that are done; run none")
    parser.add_argument("--note", default="", help="what a reader must know of this run")
    parser.add_argument("--output", type=Path, default=Path("outputs/qat_quality"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    tasks = [
        rotten_tomatoes(args.output, args.steps),
        text(args.text_model, args.text_model / "heldout_reviews.jsonl", args.text_steps),
    ]
    tasks = [
        replace(task, training=task.training | {"learning_rate": 1e-4 if task.held is None else 3e-4})
        for task in tasks
    ]
    found: dict[str, Found] = {task.name: {} for task in tasks}
    dense: dict[str, Rows] = {}
    for arm in order(args.seeds):
        if args.report and not (args.output / arm.file).exists():
            continue
        task = next(one for one in tasks if one.name == arm.task)
        facts = run(arm, task, args.output)
        if arm.method == DENSE:
            dense[arm.task] = rows_of([facts])
        else:
            found[arm.task].setdefault((arm.method, arm.bits), []).append(facts)
        print(arm.file, f"{facts['cpu_seconds']:.0f} s", flush=True)
    tasks = [task for task in tasks if found[task.name]]
    measured = {t.name: {key: point(runs, dense[t.name], t) for key, runs in found[t.name].items()} for t in tasks}
    scores = {task.name: score(dense[task.name], task) for task in tasks}
    draw(measured, scores, HERE / "results" / "qat_quality.png")
    seeds = " ".join(map(str, args.seeds))
    subjects = {"rotten-tomatoes": "MiniLM on Rotten Tomatoes", "text": f"{args.text_model.name} on IMDB reviews"}
    each = "; ".join(
        f"{subjects[task.name]}, {task.training['max_steps']} steps of {task.training['per_device_train_batch_size']} "
        f"rows, {len(dense[task.name]['right'])} held out"
        for task in tasks
    )
    record(
        "qat_quality",
        what=f"Training with rounding against rounding after training, groups of 32, seeds {seeds}: {each}. Intervals "
        f"are 95% over held-out rows, paired. {args.note}".rstrip(),
        command=f"python tests/benchmarks/qat_quality.py --text-model FOLDER --seeds {seeds}",
        figures=[one for task in tasks for one in comparisons(found[task.name], task)],
        tables=[table(task, measured[task.name], dense[task.name]) for task in tasks],
        settings={task.name: task.training | {"temperature": task.temperature} for task in tasks},
        dense=scores,
        arms={
            task: {f"{arm}, {bits} bits": one for (arm, bits), one in points.items()}
            for task, points in measured.items()
        },
    )


if __name__ == "__main__":
    main()
