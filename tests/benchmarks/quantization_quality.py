"""Weight-only quantization against its peers on the same calibration tokens: quality and CPU time.

    python tests/benchmarks/quantization_quality.py --seeds 0 1 2 \\
        --llm-compressor PYTHON --auto-round PYTHON --optimum PYTHON   # `hf-compress env add NAME` prints each

SmolLM2-135M (from its package; symmetric groups of 64, as 576 is no multiple of 128) and IMDB reviews, 32 x 512 tokens
to calibrate on, other ones for each seed, 30 x 512 held out for everybody. An arm is a process of its own
(`quantization_arm.py`), one thread; finished arms are not run again. gptq: our solver with its defaults; tuned:
with 2 epochs in which the levels of a block move together; continued: tuned, on as many rows more that the dense
model writes, from the first 16 tokens of each; qad: after tuned, 3 epochs toward the dense model's answers, on
the same rows, in which all parameters train (no peer's do); scales: after continued, 2 epochs toward the dense
model's answers on the rows of text, in which scales and norms train alone. --model FOLDER --name NAME --length 256
--rows 64 --group 32 measures another model (DeepSeek-V3: read its KL, its perplexity gap is within noise at 4 bits);
--name minilm --group 128 --length 32 --rows 512 MiniLM on Rotten Tomatoes, fine-tuned as the quickstart recipe does:
sentences of at least 32 tokens, cut there, to calibrate on, and the whole test split held out.
Gaps are perplexity less the dense model's; intervals are a bootstrap over held-out sequences, the same draws for both
sides. The package's SmolLM2 had been rounded to 4 bits in asymmetric groups of 32: other grids are honest on it.
Writes results/NAME_quantization.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent))
from oneshot_pruning import divergence, gap, ratio, smollm2, write_tokens
from report import figure, record

from hf_compress.evaluation.cost import machine_facts

SCHEMES = ("w3", "w4", "nf4", "nf4-double", "w2", "w8", "int8")
OURS, TUNED, CONTINUED = ("ours", "gptq"), ("ours", "gptq, tuned"), ("ours", "gptq, tuned, continued")
DISTILLED, SCALED, PLAIN = ("ours", "qad"), ("ours", "scales"), ("ours", "rtn")
OPTIONS = {  # where not the defaults
    "gptq, tuned": {"epochs": 2},
    "gptq, tuned, continued": {"epochs": 2, "continuations": 1},
    "qad": {"start_epochs": 2},
    "scales": {"start_epochs": 2, "continuations": 1},
}
PEERS = (("auto-round", ""), ("llm-compressor", ""), ("optimum", ""), ("torchao", ""))
DENSE_EXPERTS = ("optimum", "torchao")  # they leave stacked experts as they are: no comparison where a model has them
TARGETS = {  # scheme, peer -> ours / theirs, in perplexity gap and KL
    **{(scheme, ("auto-round", "")): 0.70 for scheme in ("w3", "w4")},
    **{(scheme, ("llm-compressor", "")): 0.45 for scheme in ("w3", "w4")},
    **{(scheme, PLAIN): 0.40 for scheme in ("nf4", "nf4-double")},  # of plain bitsandbytes: 60% of its gap closed
}
Run = dict[str, Any]
ROWS = ("nll", "dense_nll", "kl")  # of an arm, a value for each held-out row


def write_sentences(folder: Path, path: Path, *, length: int, rows: int, seeds: int = 3) -> Path:
    """Fine-tuned MiniLM in `folder`, and Rotten Tomatoes as `write_tokens` does text: `heldout` padded with 0, its
    `lengths` and `labels`; `calibration-SEED` of training sentences cut at `length`."""
    import torch
    from safetensors.torch import save_file
    from schedules_arm import rotten_tomatoes

    task = rotten_tomatoes(folder, steps=0)
    if not path.exists():
        held = [torch.tensor(row["input_ids"]) for row in task.data.eval]
        tensors = {
            "heldout": torch.nn.utils.rnn.pad_sequence(held, batch_first=True),
            "lengths": torch.tensor([len(row) for row in held]),
            "labels": torch.tensor([row["labels"] for row in task.data.eval]),
        }
        assert task.data.train is not None
        long = [row["input_ids"][:length] for row in task.data.train if len(row["input_ids"]) >= length]
        for seed in range(seeds):
            tensors[f"calibration-{seed}"] = torch.tensor(random.Random(100 + seed).sample(long, rows))
        save_file(tensors, path)
    return task.folder


def points(ours: list[Run], theirs: list[Run]) -> tuple[float, list[float]]:
    """Accuracy, ours less theirs, in points, with its 95% interval."""
    import torch

    from hf_compress.evaluation.quality import paired_difference

    base, other = (torch.tensor([run["right"] for run in runs]).mean(0) for runs in (theirs, ours))
    ones = torch.ones_like(base)
    found = paired_difference(torch.stack([base, ones], 1), torch.stack([other, ones], 1), "text-classification")
    return 100 * found["value"], [100 * found["low"], 100 * found["high"]]


def called(library: str, method: str, scheme: str, seed: int) -> str:
    return f"{library}-{method.replace(', ', '-')}-{scheme}-{seed}"


def read_by(library: str, method: str, scheme: str, seed: int, args: argparse.Namespace) -> int:
    """The seed of the arm that stands for this one: what reads no text runs once."""
    if library != "torchao" and (library, method) != PLAIN:
        return seed
    names = {each: called(library, method, scheme, each) for each in args.seeds}
    done = (s for s, n in names.items() if n in args.kept or (args.output / f"{args.name}-{n}.json").exists())
    return next(done, args.seeds[0])


def arm(library: str, method: str, scheme: str, seed: int, args: argparse.Namespace) -> Run | None:
    name = called(library, method, scheme, seed)
    out = args.output / f"{args.name}-{name}.json"
    if not out.exists() and name in args.kept:
        return args.kept[name] | {row: [float(x) for x in args.kept[name][row].split()] for row in ROWS}
    if not out.exists():
        python = {
            "ours": sys.executable,
            "torchao": sys.executable,
            "optimum": args.optimum,
            "auto-round": args.auto_round,
            "llm-compressor": args.llm_compressor,
        }[library]
        if args.report or python is None:
            return None
        command = [str(python), str(Path(__file__).with_name("quantization_arm.py")), "--library", library]
        command += ["--method", method.split(",")[0], "--options", json.dumps(OPTIONS.get(method, {}))]
        command += ["--scheme", scheme, "--group", str(args.group), "--model", str(args.model)]
        command += ["--tokens", str(args.tokens), "--seed", str(seed), "--out", str(out.absolute())]
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=os.environ | alone)
    found: Run = json.loads(out.read_text())
    return found | {"text": f"{args.rows} x {args.length}", "machine": args.machine}


def compared(runs: dict[tuple[str, tuple[str, str]], dict[int, Run]], scheme: str) -> list[dict[str, Any]]:
    figures = []
    for us, peer in product((OURS, TUNED, CONTINUED, DISTILLED, SCALED), (*PEERS, PLAIN)):
        ours, theirs = runs.get((scheme, us), {}), runs.get((scheme, peer), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            continue
        a, b = [ours[s] for s in seeds], [theirs[s] for s in seeds]
        said = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        other = {PLAIN: "to the nearest" if scheme.startswith("w") else "plain bitsandbytes"}.get(peer, peer[0])
        name, target = f"{scheme}, {us[1]} / {other} ({said})", TARGETS.get((scheme, peer))
        classifies = "right" in a[0]
        if classifies:
            value, spread = points(a, b)
            figures.append(figure(f"{name}: accuracy, points more", value, "-", True, spread=spread))
        for what, of in (("perplexity gap", gap),) * (not classifies) + (("KL to dense", divergence),):
            value, spread = ratio(of, a, b)
            wanted, reached = (f"<= {target}", value <= target) if target else ("-", True)
            figures.append(figure(f"{name}: {what}", value, wanted, reached, spread=spread))
        if peer != PLAIN and peer[0] != "torchao":  # those read no text
            alike = [(x, y) for x, y in zip(a, b, strict=True) if x["machine"] == y["machine"]]
            costs = sorted(x["cpu_seconds"] / y["cpu_seconds"] for x, y in alike)
            if not costs:
                continue
            limit = ("<= 1.0", mean(costs) <= 1) if peer[0] == "auto-round" else ("-", True)
            figures.append(figure(f"{name}: CPU time", mean(costs), *limit, spread=costs))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm-compressor", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--auto-round", type=Path, help="python of an environment with auto-round")
    parser.add_argument("--optimum", type=Path, help="python of the environment gptq")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument(
        "--tuned", nargs="*", default=["w3", "w4"], help="schemes to measure with 2 epochs of tuning too"
    )
    parser.add_argument(
        "--continued", nargs="*", default=["w3", "w4"], help="schemes to measure with rows that the model writes too"
    )
    parser.add_argument("--distilled", nargs="*", default=["w3"], help="schemes to measure with qad (text)")
    parser.add_argument("--scaled", nargs="*", default=["w3", "w4"], help="schemes to measure with scales (text)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, help="a causal model's folder; none = SmolLM2-135M")
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--held", type=int, default=30)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--report", action="store_true", help="of the arms that are done; run none")
    parser.add_argument(
        "--kept",
        action="store_true",
        help="take arms that are not in --output from results/, where arms of text are kept with their machine (CPU "
        "times are compared where both sides ran on the same one), and report their seeds too",
    )
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as other jobs beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/quantization_quality"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.tokens = args.output / f"{args.name}.safetensors"
    before = Path(__file__).parent / "results" / f"{args.name}_quantization.json"
    args.machine = machine_facts()["cpu"]
    kept = json.loads(before.read_text()).get("arms", {}) if args.kept and before.exists() else {}
    text = (f"{args.rows} x {args.length}", args.group)
    args.kept = {name: run for name, run in kept.items() if (run["text"], run["group"]) == text}
    args.seeds = sorted({*args.seeds, *(run["seed"] for run in args.kept.values())})
    if args.name == "minilm":
        args.model = write_sentences(args.output, args.tokens, length=args.length, rows=args.rows)
        args.continued = args.distilled = args.scaled = []
    args.model = args.model or smollm2(args.output / "smollm2")
    if not args.tokens.exists():
        write_tokens(args.model, args.tokens, length=args.length, rows=args.rows, held=args.held)
    stacked = bool(getattr(AutoConfig.from_pretrained(args.model), "n_routed_experts", None))
    runs: dict[tuple[str, tuple[str, str]], dict[int, Run]] = {}
    for seed in args.seeds:
        for scheme in args.schemes:
            peers = (
                [who for who in PEERS if not (stacked and who[0] in DENSE_EXPERTS)]
                if scheme in ("w2", "w3", "w4")
                else []
            )
            asked = {TUNED: args.tuned, CONTINUED: args.continued, DISTILLED: args.distilled, SCALED: args.scaled}
            more = [who for who, some in asked.items() if scheme in some]
            for library, method in (PLAIN, OURS, *peers, *more):
                one = arm(library, method, scheme, read_by(library, method, scheme, seed, args), args)
                if one is not None:
                    runs.setdefault((scheme, (library, method)), {})[seed] = one
    named = {  # what reads no text ran once for all seeds
        f"{scheme} {' '.join(who).strip()}": list({run["seed"]: run for run in some.values()}.values())
        for (scheme, who), some in runs.items()
    }
    first = next(run for some in named.values() for run in some)
    measured = {
        "perplexity": {key: [math.exp(mean(run["nll"])) for run in some] for key, some in named.items()}
        | {"dense": math.exp(mean(first["dense_nll"]))}
    }
    arms = args.kept | {
        called(library, method, scheme, run["seed"]): {
            key: " ".join(f"{x:.6g}" for x in value) if key in ROWS else value for key, value in run.items()
        }
        for (scheme, (library, method)), some in runs.items()
        for run in some.values()
    }
    held = f"{args.held} x {args.length} held out"
    elsewhere = {run["machine"] for run in arms.values()} - {args.machine}
    args.note += f" Some arms ran on {', '.join(sorted(elsewhere))}." if elsewhere else ""
    if "right" in first:
        measured = {
            "accuracy": {key: [100 * mean(run["right"]) for run in some] for key, some in named.items()}
            | {"dense": 100 * mean(first["dense_right"])}
        }
        held, arms = f"{len(first['right'])} sentences held out", {}
    record(
        f"{args.name}_quantization",
        what=f"Weight-only quantization of {args.name}, groups of {args.group}, calibration seeds {args.seeds} of "
        f"{args.rows} x {args.length} tokens, {held}; figures are ratios, lower is "
        f"better; spreads of quality are 95% intervals. {args.note}".rstrip(),
        command=f"python tests/benchmarks/quantization_quality.py --seeds {' '.join(map(str, args.seeds))}"
        + (
            f"{'' if args.name == 'minilm' else ' --model FOLDER'} --name {args.name} --length {args.length} "
            f"--rows {args.rows} --group {args.group}"
            if args.name != "smollm2"
            else ""
        ),
        figures=[made for scheme in args.schemes for made in compared(runs, scheme)],
        **measured,
        kl={key: [mean(run["kl"]) for run in some] for key, some in named.items()},
        seconds={key: [run["cpu_seconds"] for run in some] for key, some in named.items()},
        peak_mb={key: [run["peak_mb"] for run in some] for key, some in named.items()},
        arms=arms,
    )


if __name__ == "__main__":
    main()
