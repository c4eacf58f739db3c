"""What rows that the model writes are worth where text is scarce: KL to the dense model after gptq at 3 bits, by rows
of text and how often the model goes on with each.

    python tests/benchmarks/continuations.py --model FOLDER --name deepseek-v3-8m

On the tokens of `quantization_quality.py` (64 x 256 on IMDB, 60 x 256 held out for everybody): its first 8, 32 or 64
calibration rows. An arm is a process of its own (`quantization_arm.py`), one thread; finished arms are not run again.
Writes results/NAME_continuations.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from oneshot_pruning import divergence, ratio, write_tokens
from report import figure, record

ARMS = ((8, 0), (8, 3), (8, 7), (32, 0), (32, 1), (64, 0))  # rows of text, continuations of each


def arm(rows: int, times: int, args: argparse.Namespace) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    out = args.output / f"{args.name}-{rows}-{times}.json"
    if not out.exists():
        few = args.output / f"{args.name}-{rows}.safetensors"
        if not few.exists():
            tokens = load_file(args.tokens)
            save_file({"heldout": tokens["heldout"], "calibration-0": tokens["calibration-0"][:rows].clone()}, few)
        command = [sys.executable, str(Path(__file__).with_name("quantization_arm.py")), "--library", "ours"]
        command += ["--method", "gptq", "--options", json.dumps({"continuations": times}), "--scheme", "w3"]
        command += ["--group", str(args.group), "--model", str(args.model), "--tokens", str(few), "--out", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a causal model's folder")
    parser.add_argument("--name", required=True)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as other jobs beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/continuations"))
    args = parser.parse_args()
    args.output = args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    args.tokens = args.output / f"{args.name}.safetensors"
    if not args.tokens.exists():
        write_tokens(args.model, args.tokens, length=args.length, rows=64, held=60)
    runs = {each: arm(*each, args) for each in ARMS}
    figures = []
    for (rows, times), run in runs.items():
        if (rows, times) != (8, 0):
            more = f" and {times} x that of the model's own" if times else ""
            value, spread = ratio(divergence, [run], [runs[8, 0]])
            figures.append(figure(f"{rows} rows{more}, against 8 rows: KL to dense", value, "-", True, spread=spread))
    record(
        f"{args.name}_continuations",
        what=f"gptq at 3 bits, groups of {args.group}, on few rows of {args.length} tokens and on what the dense "
        f"model goes on with from 16 tokens of each, 60 held out; ratios, lower is better, one seed; spreads are 95% "
        f"intervals over held-out rows. {args.note}".rstrip(),
        command=f"python tests/benchmarks/continuations.py --model FOLDER --name {args.name}",
        figures=figures,
        kl={f"{rows} rows, {times} continuations": mean(run["kl"]) for (rows, times), run in runs.items()},
        seconds={f"{rows} rows, {times} continuations": run["cpu_seconds"] for (rows, times), run in runs.items()},
    )


if __name__ == "__main__":
    main()
