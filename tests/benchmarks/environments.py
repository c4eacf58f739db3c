"""Environments of their own: what building each costs, and what comes back from the libraries in them.

    python tests/benchmarks/environments.py

Builds those of gptq, openvino and onnx where they are missing (minutes and about 5 GB), then sends a tiny llama and a
tiny bert (tests/models.py: random weights, so errors are larger than a trained model's) through every format.
Errors are of logits at 3 rows of 40 random tokens, against the dense model in torch: largest difference over the
largest logit, and mean KL. Reopened: the same of a second process against the first. Writes results/environments.json;
builds found there keep the seconds of the run that made them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
from report import figure, record

from hf_compress import quantize, verify
from hf_compress.backends.elsewhere import FORMATS, export_elsewhere
from hf_compress.environments import add, found
from hf_compress.verification import TOLERANCE
from tests.models import tiny

MODELS = ("llama", "bert")
GPTQ = ((8, None), (4, 32), (3, 32))


def calibration(vocab: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, vocab, (16, 48), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def exported(model: Any, room: Path, name: str, quantized: str | None) -> dict[str, Any]:
    facts = export_elsewhere(
        model, room, format=name, quantize=quantized, calibration=calibration(model.config.vocab_size)
    )
    return {k: facts[k] for k in ("relative_error", "kl_to_dense", "reopened_difference", "bytes", "fp32_error")}


def rounded(model: Any, room: Path, bits: int, group_size: int | None) -> dict[str, Any]:
    rows = calibration(model.config.vocab_size)
    written = quantize(model, room / "gptq", backend="gptq", bits=bits, group_size=group_size, batches=rows)
    size = sum(p.stat().st_size for p in (room / "gptq").glob("*.safetensors"))
    opened = verify(room / "gptq")[str(room / "gptq")]["logits_difference"]
    return written.facts | {"reopened_difference": opened, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--only", nargs="+", default=["gptq", *FORMATS])
    args = parser.parse_args()
    for name in ("openvino", "onnx", "gptq"):
        print(name, add(name, say=print))
    built = [one.record for one in found() if not one.stale]
    rows: list[dict[str, Any]] = []
    for family in args.models:
        jobs = [(name, how) for name in FORMATS if name in args.only for how in FORMATS[name].quantize]
        jobs += [("gptq", pair) for pair in GPTQ if "gptq" in args.only]
        for name, how in jobs:
            with tempfile.TemporaryDirectory() as scratch:
                model, room = tiny(family), Path(scratch)
                got = rounded(model, room, *how) if name == "gptq" else exported(model, room, name, how)
            dense = sum(p.numel() * p.element_size() for p in model.parameters())
            scheme = (
                how or "fp32" if name != "gptq" else f"{how[0]} bits" + (f", groups of {how[1]}" if how[1] else "")
            )
            rows.append({"library": name, "model": family, "scheme": scheme, "dense_bytes": dense} | got)
            print(rows[-1], flush=True)
    reopened = max(row["reopened_difference"] for row in rows)
    fp32 = [row["fp32_error"] for row in rows if "fp32_error" in row]
    figures = [
        figure("largest reopened difference", reopened, f"<= {TOLERANCE:g}", reopened <= TOLERANCE),
        *([figure("largest error of an fp32 export", max(fp32), "<= 1e-3", max(fp32) <= 1e-3)] if fp32 else []),
        *(figure(f"{one['name']}: seconds to build", one["seconds"], "-", True) for one in built),
        *(figure(f"{one['name']}: MB on disk", one["megabytes"], "-", True) for one in built),
    ]
    table = {
        "title": "Tiny models with random weights; bytes of the weights, dense in fp32",
        "columns": ["library", "model", "scheme", "relative error", "KL", "reopened", "bytes", "x smaller"],
        "rows": [
            [row["library"], row["model"], row["scheme"], f"{row['relative_error']:.1e}", f"{row['kl_to_dense']:.1e}"]
            + [f"{row['reopened_difference']:.1e}", str(row["bytes"]), f"{row['dense_bytes'] / row['bytes']:.2f}"]
            for row in rows
        ],
    }
    record(
        "environments",
        what="Libraries that cannot share an environment with hf_compress: what building each costs, and how near to "
        "the dense model is what they write.",
        command="python tests/benchmarks/environments.py",
        figures=figures,
        built=built,
        rows=rows,
        tables=[table],
    )


if __name__ == "__main__":
    main()
