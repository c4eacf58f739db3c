"""What distillation costs a step: CPU time and memory against the floor (teacher's forward + plain step) and TRL.

    python tests/benchmarks/distillation_cost.py --peer PYTHON

Vocabularies of 32,000 and 129,280, width 512, one sequence a step. The trunk has so many layers that the head's share
of the weights that multiply is that of TinyLlama-1.1B (6.3%) and of Llama-3.2-1B (21%): 58 layers give both. Larger
models have a smaller share, so this is the hard end of 1 to 8B; and a width of 512 makes what is done once a logit
weigh 4 to 8 times as much as there. The head-heavy worst case has 2 layers (66% and 89%).
Arms are processes of `distillation_arm.py`, one thread each; finished ones are not run again. CPU time is that of the
median step, in rounds in which the arms take turns; the median ratio of the rounds is given. Memory is measured in
processes of their own, whose C library is told to give freed memory back (the card of facts has both). Writes
results/distillation_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record

VOCABULARIES = (32_000, 129_280)
TRUNKS = {"1B-like": 58, "head-heavy": 2}
STEPS = ("floor", "chunked", "whole", "soft", "gkd")
LOSSES = ("loss-naive", "loss-chunked", "loss-trl")
WIDTH = 512


def arm(name: str, vocabulary: int, layers: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the median step of each round; peak memory of a further process that gives freed memory back at
    once."""
    rounds = [process(name, vocabulary, layers, tokens, str(index), args) for index in range(args.rounds)]
    frugal = process(name, vocabulary, layers, tokens, "memory", args)
    found: dict[str, Any] = {}
    if any(rounds):
        found["step_seconds"] = {
            str(index): median(each["cpu_seconds"][1:] or each["cpu_seconds"])
            for index, each in enumerate(rounds)
            if each
        }
        found["plain_peak_mb"] = min(each["peak_mb"] for each in rounds if each)
    if frugal is not None:
        found |= {"peak_mb": frugal["peak_mb"], "losses": frugal["losses"], "gradients": frugal.get("gradients")}
    return found


def paired(ours: dict[str, float], theirs: dict[str, float]) -> list[float]:
    """Ratios of the rounds that both have: these ran in turn."""
    return [ours[index] / theirs[index] for index in ours.keys() & theirs.keys()]


def process(
    name: str, vocabulary: int, layers: int, tokens: int, which: str, args: argparse.Namespace
) -> dict[str, Any] | None:
    """What it wrote; None for one that has not run, when only a report is wanted."""
    out = args.output / f"{name}-{vocabulary}-{layers}-{tokens}-{which}.json"
    if not out.exists():
        if args.report:
            return None
        peer = name in ("gkd", "loss-trl")
        command = [str(args.peer) if peer else sys.executable, str(Path(__file__).with_name("distillation_arm.py"))]
        command += ["--arm", name, "--vocabulary", str(vocabulary), "--layers", str(layers), "--width", str(WIDTH)]
        short = layers == TRUNKS["head-heavy"]
        steps = 1 if which == "memory" else args.steps * (4 if short else 1)
        command += ["--tokens", str(tokens), "--steps", str(steps), "--out", str(out.absolute())]
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        if which == "memory":  # else the C library keeps what is freed, more or less of it by chance
            alone["MALLOC_MMAP_THRESHOLD_"] = "1000000"
        subprocess.run(command, check=True, env=os.environ | alone, cwd=args.output)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="python of an environment with TRL 1.16")
    parser.add_argument("--steps", type=int, default=3, help="a process (the first warms up); four times: head-heavy")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each arm, in turn")
    parser.add_argument("--tokens", type=int, default=256, help="of a step; losses alone take four times as many")
    parser.add_argument("--report", action="store_true", help="run nothing more: a report of what has run")
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as other jobs beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/distillation_cost"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, Any]] = {}
    figures, missing = list[dict[str, Any]](), list[str]()

    for index in range(args.rounds):  # arms in turn, so that a busy minute does not fall on one alone
        for layers in TRUNKS.values():
            for vocabulary in VOCABULARIES:
                for name in STEPS:
                    process(name, vocabulary, layers, args.tokens, str(index), args)

    def ratio(label: str, ours: dict[str, Any], theirs: dict[str, Any], field: str, limit: float | None) -> None:
        if field not in ours or field not in theirs:
            missing.append(label)
            return
        values = [ours[field] / theirs[field]] if field != "step_seconds" else paired(ours[field], theirs[field])
        value, target = median(values), f"<= {limit}x" if limit else "-"
        spread = sorted(values) if len(values) > 1 else []
        figures.append(figure(label, value, target, limit is None or value <= limit, spread=spread))

    for vocabulary in VOCABULARIES:
        here = {name: arm(name, vocabulary, 0, 4 * args.tokens, args) for name in LOSSES}
        runs |= {f"{name} {vocabulary}": found for name, found in here.items()}
        label = f"loss and backward, {vocabulary:,}"
        ratio(f"{label}: chunked / naive, peak memory", here["loss-chunked"], here["loss-naive"], "peak_mb", 0.2)
        ratio(f"{label}: chunked / naive, CPU time", here["loss-chunked"], here["loss-naive"], "step_seconds", None)
        ratio(f"{label}: chunked / TRL, peak memory", here["loss-chunked"], here["loss-trl"], "peak_mb", 1.0)
        ratio(f"{label}: chunked / TRL, CPU time", here["loss-chunked"], here["loss-trl"], "step_seconds", 1.0)
        gradients = [here[name].get("gradients") or [] for name in ("loss-chunked", "loss-naive")]
        for a, b in zip(*gradients):
            assert abs(a / b - 1) < 1e-3, "the arms do not compute the same"
    for trunk, layers in TRUNKS.items():
        for vocabulary in VOCABULARIES:
            here = {name: arm(name, vocabulary, layers, args.tokens, args) for name in STEPS}
            runs |= {f"{name} {trunk} {vocabulary}": found for name, found in here.items()}
            label = f"{trunk}, {vocabulary:,}"
            limit = 1.1 if trunk == "1B-like" else None
            ratio(f"{label}: chunked / floor, CPU time", here["chunked"], here["floor"], "step_seconds", limit)
            ratio(f"{label}: chunked / floor, peak memory", here["chunked"], here["floor"], "peak_mb", None)
            ratio(f"{label}: whole logits / floor, CPU time", here["whole"], here["floor"], "step_seconds", None)
            ratio(f"{label}: whole logits / floor, peak memory", here["whole"], here["floor"], "peak_mb", None)
            ratio(f"{label}: chunked / TRL GKD, CPU time", here["chunked"], here["gkd"], "step_seconds", 1.0)
            ratio(f"{label}: chunked / TRL GKD, peak memory", here["chunked"], here["gkd"], "peak_mb", 1.0)
            alike = "chunked, without cross-entropy as it is / TRL GKD"
            ratio(f"{label}: {alike}, CPU time", here["soft"], here["gkd"], "step_seconds", 1.0)
            ratio(f"{label}: {alike}, peak memory", here["soft"], here["gkd"], "peak_mb", 1.0)
            kept = "peak memory with what the C library keeps"
            ratio(f"{label}: chunked / floor, {kept}", here["chunked"], here["floor"], "plain_peak_mb", None)
            ratio(f"{label}: chunked / TRL GKD, {kept}", here["chunked"], here["gkd"], "plain_peak_mb", None)
    record(
        "distillation_cost",
        what=f"CPU time and peak anonymous memory of distillation steps, width {WIDTH}, {args.tokens} tokens a step "
        f"({4 * args.tokens} for losses alone), one thread, fp32; the teacher is as large as the student. "
        f"{args.note}".rstrip()
        + (f" {len(missing)} comparisons have not run." if missing else ""),
        command="python tests/benchmarks/distillation_cost.py --peer PYTHON",
        figures=figures,
        runs=runs,
        missing=missing,
    )


if __name__ == "__main__":
    main()
