"""One-shot, gradual and iterative pruning at equal steps, with and without distillation: quality against sparsity.

    python tests/benchmarks/pruning_schedules.py --text-model FOLDER --seeds 0

Two tasks: MiniLM on Rotten Tomatoes, as the quickstart recipe fine-tunes it (once, kept in --output), and a causal
model (--text-model, a folder that also holds heldout_reviews.jsonl, reviews it was not trained on) on IMDB reviews.
From the dense model each arm trains as many steps on the same rows, at the same highest learning rate on a cosine; the
cycles of iterative pruning each have a cosine of their own, and `rewound` sends the survivors back to the dense values
after every cut. Distilled arms learn the dense model's answers (forward KL) and no labels. Magnitude, unstructured. A
seed is an order of rows (and of dropout). `alps` prunes in one shot and does not train.
Learning rates are not tuned for each schedule. On Rotten Tomatoes it is that of the quickstart recipe's distillation
(of three tried on one-shot at 90%, by training loss the middle one); on text the better of two, tried on one-shot at
90% with 8 rows a step, which may favour one-shot.
Arms that are done, files of --output, are not run again: stop and go on as you like. Intervals are 95% bootstrap
intervals over held-out rows, paired with the dense model or between arms.
Writes results/pruning_schedules.json and .png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from report import HERE, figure, record
from schedules_arm import DENSE, SCHEDULES, UNTRAINED, Arm, Task, rotten_tomatoes, run, text
from schedules_plot import draw

from hf_compress.evaluation.quality import paired_difference

SPARSITIES = (0.9, 0.7, 0.5)  # in the order they are run
KEY = (0.7, 0.9)  # compared in the figures
TASKS = ("rotten-tomatoes", "text")
TAUGHT = {False: "labels", True: "distilled"}
ARMS = [(schedule, distilled) for schedule in SCHEDULES for distilled in TAUGHT] + [(UNTRAINED, False)]
DRAWS = 2000
Rows = dict[str, torch.Tensor]
"""Held-out rows of an arm: sums of `predictions`, `right`, `nll` and `kl` of each, means over seeds."""
Found = dict[tuple[str, bool, float], list[dict[str, Any]]]
"""Schedule, distilled, sparsity -> the arm's facts, a seed each."""


def rows_of(runs: list[dict[str, Any]]) -> Rows:
    names = ("predictions", "right", "nll", "kl")
    return {name: torch.tensor([run[name] for run in runs], dtype=torch.float64).mean(0) for name in names}


def score(rows: Rows, task: Task) -> float:
    """Accuracy in percent, or perplexity."""
    if task.kind == "text-classification":
        return 100 * float(rows["right"].sum() / rows["predictions"].sum())
    return float((rows["nll"].sum() / rows["predictions"].sum()).exp())


def difference(base: Rows, ours: Rows, task: Task) -> dict[str, float]:
    """Points of accuracy (ours - base), or perplexity over perplexity."""
    what, scale = ("right", 100) if task.kind == "text-classification" else ("nll", 1)
    pair = (torch.stack([rows[what], rows["predictions"]], 1) for rows in (base, ours))
    return {name: scale * value for name, value in paired_difference(*pair, task.kind).items()}


def interval(values: torch.Tensor, over: torch.Tensor) -> dict[str, float]:
    """sum(values) / sum(over) over held-out rows."""
    draws = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    ratios = values[draws].sum(1) / over[draws].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(values.sum() / over.sum()), "low": low, "high": high}


def point(runs: list[dict[str, Any]], dense: Rows, task: Task) -> dict[str, Any]:
    """One arm at one sparsity: score and KL with intervals, the score's being that of the paired difference."""
    rows = rows_of(runs)
    apart, value, base = difference(dense, rows, task), score(rows, task), score(dense, task)
    classes = task.kind == "text-classification"
    around = {end: base + apart[end] if classes else base * apart[end] for end in ("low", "high")}
    return {
        "score": {"value": value} | around,
        "difference": apart,
        "kl": interval(rows["kl"], rows["predictions"]),
        "log_loss": float(rows["nll"].sum() / rows["predictions"].sum()),
        "seeds": [score(rows_of([run]), task) for run in runs],
        "sparsity": [run["sparsity"] for run in runs],
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
    }


def curves(found: Found, dense: Rows, task: Task) -> list[dict[str, Any]]:
    """Each arm over the sparsities that were run."""
    some = []
    for schedule, distilled in ARMS:
        at = {
            str(s): point(found[schedule, distilled, s], dense, task)
            for s in sorted(SPARSITIES)
            if (schedule, distilled, s) in found
        }
        some.append({"schedule": schedule, "distilled": distilled, "at": at})
    return [one for one in some if one["at"]]


def table(task: Task, some: list[dict[str, Any]], dense: Rows) -> dict[str, Any]:
    """Score (its interval) and KL of every arm at every sparsity, as text."""
    classes = task.kind == "text-classification"
    title = (
        f"{task.name}: {'accuracy in %' if classes else 'perplexity'}, dense {score(dense, task):.2f}, and KL to dense"
    )

    def cell(one: dict[str, Any] | None) -> str:
        if one is None:
            return "-"
        middle = one["score"]
        return f"{middle['value']:.1f} ({middle['low']:.1f} to {middle['high']:.1f}), {one['kl']['value']:.3f}"

    rows = [
        [one["schedule"] + ("" if one["schedule"] == UNTRAINED else f", {TAUGHT[one['distilled']]}")]
        + [cell(one["at"].get(str(s))) for s in sorted(SPARSITIES)]
        for one in some
    ]
    return {"title": title, "columns": ["schedule, learns", *(f"{s:.0%}" for s in sorted(SPARSITIES))], "rows": rows}


def comparisons(found: Found, task: Task) -> list[dict[str, Any]]:
    """Pairs of arms at the key sparsities: score and KL, the second over (or less) the first."""
    base, figures = ("one-shot", True), []
    against = [(base, (schedule, True)) for schedule in SCHEDULES if schedule != base[0]]
    against += [((schedule, False), (schedule, True)) for schedule in SCHEDULES]
    for sparsity in KEY:
        for first, second in against:
            if (*first, sparsity) not in found or (*second, sparsity) not in found:
                continue
            one, other = rows_of(found[*first, sparsity]), rows_of(found[*second, sparsity])
            names = [f"{schedule} {TAUGHT[distilled]}" for schedule, distilled in (second, first)]
            what = f"{task.name}, {sparsity:.0%}: {names[0]} against {names[1]}"
            apart, kl = difference(one, other, task), interval(other["kl"], one["kl"])
            unit = "accuracy, points" if task.kind == "text-classification" else "perplexity, ratio"
            for label, pair in ((unit, apart), ("KL to dense, ratio", kl)):
                spread = [pair["low"], pair["high"]]
                figures.append(figure(f"{what}: {label}", pair["value"], "-", True, spread=spread))
    return figures


def order(seeds: list[int], key_seeds: list[int]) -> list[Arm]:
    """All arms, what matters most first: a run that is stopped has the more."""
    plan = [(seed, s) for seed in seeds for s in SPARSITIES] + [(seed, s) for seed in key_seeds for s in reversed(KEY)]
    arms = [Arm(task, *arm, sparsity, seed) for seed, sparsity in plan for task in TASKS for arm in ARMS]
    arms.sort(key=lambda arm: (arm.schedule == "iterative") * (1 + (arm.sparsity not in KEY)))
    return [Arm(task, DENSE, False, 0.0, 0) for task in TASKS] + arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-model", type=Path, required=True, help="causal model with its heldout_reviews.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--key-seeds", type=int, nargs="*", default=[], help="more seeds, at the key sparsities only")
    parser.add_argument("--steps", type=int, default=120, help="of every arm on Rotten Tomatoes")
    parser.add_argument("--text-steps", type=int, default=48, help="of every arm on text")
    parser.add_argument("--report", action="store_true", help="of the arms that are done; run none")
    parser.add_argument("--note", default="", help="what a reader must know of this run")
    parser.add_argument("--output", type=Path, default=Path("outputs/pruning_schedules"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    held = args.text_model / "heldout_reviews.jsonl"
    tasks = [rotten_tomatoes(args.output, args.steps), text(args.text_model, held, args.text_steps)]
    found: dict[str, Found] = {task.name: {} for task in tasks}
    dense: dict[str, Rows] = {}
    for arm in order(args.seeds, args.key_seeds):
        if args.report and not (args.output / arm.file).exists():
            continue
        task = next(one for one in tasks if one.name == arm.task)
        facts = run(arm, task, args.output)
        if arm.schedule == DENSE:
            dense[arm.task] = rows_of([facts])
        else:
            found[arm.task].setdefault((arm.schedule, arm.distilled, arm.sparsity), []).append(facts)
        print(arm.file, flush=True)
    tasks = [task for task in tasks if found[task.name]]
    measured = {task.name: curves(found[task.name], dense[task.name], task) for task in tasks}
    scores = {task.name: score(dense[task.name], task) for task in tasks}
    draw(measured, scores, HERE / "results" / "pruning_schedules.png")
    seeds, more = " ".join(map(str, args.seeds)), " ".join(map(str, args.key_seeds))
    also = f", at {KEY[0]:.0%} and {KEY[1]:.0%} also {more}" if more else ""
    subjects = {"rotten-tomatoes": "MiniLM on Rotten Tomatoes", "text": f"{args.text_model.name} on IMDB reviews"}
    each = "; ".join(
        f"{subjects[task.name]}, {task.training['max_steps']} steps of {task.training['per_device_train_batch_size']} "
        f"rows, {len(dense[task.name]['right'])} held out"
        for task in tasks
    )
    record(
        "pruning_schedules",
        what=f"Pruning schedules at equal steps, magnitude, unstructured, seeds {seeds}{also}: {each}. Intervals are "
        f"95% over held-out rows, paired. {args.note}".rstrip(),
        command=f"python tests/benchmarks/pruning_schedules.py --text-model FOLDER --seeds {seeds}"
        + (f" --key-seeds {more}" if more else ""),
        figures=[one for task in tasks for one in comparisons(found[task.name], task)],
        tables=[table(task, measured[task.name], dense[task.name]) for task in tasks],
        settings={task.name: task.training | {"temperature": task.temperature} for task in tasks},
        dense=scores,
        arms=measured,
    )


if __name__ == "__main__":
    main()
