"""What techniques keep beside a checkpoint's weights: tensors in one file, with a hash of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.techniques.base import Technique

STATE_FILE = "compression_state.safetensors"


def save_state(folder: Path, techniques: Sequence[Technique]) -> None:
    """Write every technique's `state` (masks are bit-packed) and the SHA-256 of each tensor."""
    tensors = {
        f"{type(t).__name__}/{key}": value.detach().cpu().contiguous()
        for t in techniques
        for key, value in t.state().items()
    }
    hashes = {key: _sha256(value) for key, value in tensors.items()}
    save_file(tensors, folder / STATE_FILE, {"techniques": _signature(techniques), "sha256": json.dumps(hashes)})


def load_state(folder: Path, techniques: Sequence[Technique]) -> None:
    """Give every technique its state back.

    Raises:
        CompressError: no such file, one that is damaged, or of other techniques; what a technique finds wrong.
    """
    file = folder / STATE_FILE
    if not file.exists():
        raise CompressError(
            "the checkpoint holds no state of the techniques",
            where=str(folder),
            next_step="resume a run of CompressionTrainer",
        )
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
        tensors = load_file(file)
    except SafetensorError as error:
        raise _damaged(file) from error
    if facts["techniques"] != _signature(techniques):
        raise CompressError(
            f"the checkpoint was written with the techniques {facts['techniques']}, this run has "
            f"{_signature(techniques)}",
            where=str(folder),
            next_step="resume with the same techniques, or start a new run",
        )
    if json.loads(facts["sha256"]) != {key: _sha256(value) for key, value in tensors.items()}:
        raise _damaged(file)
    for technique in techniques:
        prefix = f"{type(technique).__name__}/"
        technique.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def _damaged(file: Path) -> CompressError:
    return CompressError(
        "the techniques' state is not what was written: a hash differs, or the file is cut off",
        where=str(file),
        next_step="resume from an earlier checkpoint",
    )


def _signature(techniques: Sequence[Technique]) -> str:
    return json.dumps([type(t).__name__ for t in techniques])


def _sha256(tensor: Tensor) -> str:
    shape = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(shape + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
