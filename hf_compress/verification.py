"""Does a finished folder open without hf_compress? Asked in a fresh process that cannot import it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.weights import weights

EXPECTATION = "expectation.safetensors"
TOLERANCE = 1e-3  # of the largest logit: another process may sum in another order

_CHILD = Path(__file__).with_name("reload_check.py")


def write_expectation(model: PreTrainedModel, folder: Path) -> None:
    """Record, beside the checkpoint, what the model answers to a fixed probe, its zeros, what the ONNX file says.

    ``expectation.safetensors``: input_ids (2, 16), attention_mask, logits, onnx_logits, and zeros.NAME, the count of
    exact zeros of each pruned parameter.
    """
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (2, 16), generator=made)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        tensors = {
            "input_ids": ids,
            "attention_mask": mask,
            "logits": model(input_ids=ids, attention_mask=mask).logits.float().contiguous(),
        }
    for parameter, whole in {w.parameter: w.whole for w in weights(model)}.items():
        zeros = int((whole == 0).sum()) if whole.is_floating_point() else 0
        if zeros > 0.01 * whole.numel():
            tensors[f"zeros.{parameter}"] = torch.tensor(zeros)
    files = sorted((folder / "onnx").glob("*.onnx"))
    if files:
        from onnxruntime import InferenceSession

        (got,) = InferenceSession(files[0], providers=["CPUExecutionProvider"]).run(
            None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        )
        tensors["onnx_logits"] = torch.from_numpy(got)
    save_file(tensors, folder / EXPECTATION)


def verify(*folders: Path, tolerance: float = TOLERANCE) -> dict[str, dict[str, Any]]:
    """Open each folder in one fresh process where importing hf_compress fails; folder -> facts.

    Checks: plain from_pretrained with the class the config names; no missing, unexpected or mismatched key; no pickle
    file; finite logits within `tolerance` of the largest, of what the model in memory gave; zeros still zero; ties
    still tied; generate works; ONNX opens and agrees.

    Raises:
        CompressError: naming every problem found.
    """
    for folder in folders:
        for name in ("config.json", EXPECTATION):
            if not (folder / name).exists():
                raise CompressError(
                    f"no {name} here",
                    where=str(folder),
                    next_step="verify takes a folder that `hf-compress run` finished",
                )
    done = subprocess.run(
        [sys.executable, "-P", str(_CHILD), str(tolerance), *map(str, folders)], capture_output=True, text=True
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("REPORT")), None)
    if line is None:
        raise CompressError(
            "the process that opens the checkpoint died", where=str(folders[0]), next_step=done.stderr.strip()[-500:]
        )
    report = json.loads(line.removeprefix("REPORT"))
    problems = [f"{folder}: {problem}" for folder, (found, _) in report.items() for problem in found]
    if problems:
        raise CompressError(
            "the checkpoint does not reload as it should",
            where="; ".join(problems),
            next_step="do not publish it; report how it was made",
        )
    return {folder: facts for folder, (_, facts) in report.items()}
