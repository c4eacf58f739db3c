"""The quickstart recipe over several seeds: how small, how fast, how much accuracy is lost, against the dense model.

    python tests/benchmarks/quickstart_seeds.py --seeds 0 1 2 --output outputs/seeds

Each seed is a whole run (a dense reference of its own, about 10 minutes on 2 cores); finished seeds are not redone.
Writes results/quickstart_seeds.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record


def run(seed: int, output: Path) -> dict[str, Any]:
    """Facts of one seed's finished folder."""
    from hf_compress.card import read_facts

    if not output.exists():
        command = Path(sys.executable).with_name("hf-compress")
        subprocess.run([command, "run", "quickstart", "--output", str(output), "--set", f"seed={seed}"], check=True)
    return read_facts(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/seeds"))
    args = parser.parse_args()
    runs = {seed: run(seed, args.output / str(seed)) for seed in args.seeds}
    found = [facts["evaluation"]["artefacts"] for facts in runs.values()]

    def each(name: str, read: Any) -> list[float]:
        return [read(artefacts[name]) for artefacts in found]

    figures = []
    for name, label in (("root", "checkpoint"), ("onnx", "ONNX file")):
        drops = each(name, lambda a: -100 * a["accuracy_difference"]["value"])
        figures.append(
            figure(
                f"accuracy lost by the {label}, points, mean", mean(drops), "<= 1.0", mean(drops) <= 1, spread=drops
            )
        )
    smaller = [a["dense"]["bytes"] / a["root"]["bytes"] for a in found]
    figures.append(figure("checkpoint smaller than dense", min(smaller), ">= 3x", min(smaller) >= 3, spread=smaller))
    plain = [a["plain_onnx"]["bytes"] / a["onnx"]["bytes"] for a in found]
    figures.append(
        figure("ONNX file smaller than plain ONNX int8", min(plain), ">= 1.35x", min(plain) >= 1.35, spread=plain)
    )
    for size in ("1", "32"):
        for clock in ("wall", "cpu"):
            ours = each("onnx", lambda a, s=size, c=clock: a["latency"][s][f"speedup_{c}"]["median"])
            theirs = each("plain_onnx", lambda a, s=size, c=clock: a["latency"][s][f"speedup_{c}"]["median"])
            label = f"batch {size}, {clock} time: ONNX file faster than"
            figures.append(figure(f"{label} dense", min(ours), ">= 6x", min(ours) >= 6, spread=ours))
            ratio = [a / b for a, b in zip(ours, theirs, strict=True)]
            figures.append(figure(f"{label} plain ONNX int8", min(ratio), ">= 1.5x", min(ratio) >= 1.5, spread=ratio))
    record(
        "quickstart_seeds",
        what=f"The quickstart recipe, whole, seeds {args.seeds}: MiniLM on Rotten Tomatoes, each against its own "
        "dense model. Sizes and speeds show the worst seed.",
        command=f"python tests/benchmarks/quickstart_seeds.py --seeds {' '.join(map(str, args.seeds))}",
        figures=figures,
        seconds={seed: sum(s["seconds"] for s in facts["stages"]) for seed, facts in runs.items()},
        versions=next(iter(runs.values()))["versions"],
        recipe=next(iter(runs.values()))["recipe"],
        runs={seed: facts["evaluation"] for seed, facts in runs.items()},
    )


if __name__ == "__main__":
    main()
