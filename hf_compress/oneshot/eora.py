"""What rounding took away, as a small LoRA adapter fitted to what each matrix reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration import Batch
from hf_compress.criteria import Statistics
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.oneshot.engine import run_blocks
from hf_compress.oneshot.memory import InMemory
from hf_compress.oneshot.solvers import Solved, Solver
from hf_compress.weights import Weight, weights

DAMPING = 1e-4  # of the mean diagonal of H
SKIPPED = "peft puts no plain adapter on stacked experts, and takes other FFN matrices of such a model for them"


@dataclass
class Eora:
    """``eora: {rank: 32}``"""

    rank: int = field(default=32, metadata={"help": "of the correction of each matrix"})

    def check(self, *, where: str) -> None:
        if self.rank < 1:
            raise CompressError(f"rank {self.rank} is below 1", where=f"{where}.rank")


def low_rank_correction(missing: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """B (out, rank), A (rank, in) with the least tr((D - BA) H (D - BA)^T), D = W - W_rounded (out, in), and the
    singular values of D P, whose squares from `rank` on add up to it.

        H = V L V^T,   P = V L^1/2,   D P = U S R^T,   B A = (U_r S_r) (R_r^T P^-1)

    H = I is the plain truncated SVD. EoRA (Liu et al. 2024, https://arxiv.org/abs/2410.21271). H (in, in) is damped
    where inputs are never seen; rows and columns beyond the rank of D are 0.
    """
    moved = hessian.double().clone()
    mean = moved.diagonal().mean()
    moved.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    size, vectors = torch.linalg.eigh(moved)
    root = size.clamp_min(float(size.max()) * 1e-12).sqrt()
    left, values, right = torch.linalg.svd(missing.double() @ (vectors * root), full_matrices=False)
    kept = min(rank, len(values))
    b, a = missing.new_zeros(len(missing), rank), missing.new_zeros(rank, missing.shape[1])
    b[:, :kept] = left[:, :kept] * values[:kept].sqrt()
    a[:kept] = values[:kept, None].sqrt() * (right[:kept] / root) @ vectors.T
    return b, a, values


def correctable(model: PreTrainedModel, only: Collection[str]) -> list[Weight]:
    """Of the weights named in `only` those that an adapter corrects: beside routed experts only attention
    (`SKIPPED`)."""
    routed, wanted = family_of(model.config).experts is not None, set(only)
    return [w for w in weights(model) if w.name in wanted and (w.kind == "attention" or not routed)]


@torch.no_grad()
def write_adapter(
    model: PreTrainedModel,
    batches: list[Batch],
    dense: Mapping[str, Tensor],
    folder: Path,
    *,
    rank: int,
    left: int = 0,
) -> dict[str, Any]:
    """Write a peft adapter for `model`, which holds what its container stores, into `folder`; facts of it.

    ``PeftModel.from_pretrained(quantized, folder)`` opens it (with compressed-tensors after a first forward, which
    gives its layers the weight that peft looks for). H is that of the rounded model's inputs.

    Args:
        dense: weight name -> (out, in) before rounding, of those that are `correctable`. left: how many more were
        rounded, for the facts.

    Raises:
        CompressError: as `run_blocks`; nothing to correct.
    """
    if not dense:
        raise CompressError("no matrix to correct", where="eora", next_step="leave eora out")
    tensors: dict[str, Tensor] = {}
    before = after = 0.0

    def correct(group: Sequence[Weight], statistics: Statistics) -> list[Solved]:
        nonlocal before, after
        assert statistics.hessian is not None
        for weight in group:
            missing = dense[weight.name].float() - weight.matrix.float()
            b, a, values = low_rank_correction(missing, statistics.hessian, rank)
            key = f"base_model.model.{weight.module_name}"
            tensors[f"{key}.lora_A.weight"] = a.to(weight.matrix.dtype)
            tensors[f"{key}.lora_B.weight"] = b.to(weight.matrix.dtype)
            squares = values.square()
            before, after = before + float(squares.sum()), after + float(squares[rank:].sum())
        return [Solved(weight.matrix) for weight in group]

    run_blocks(model, batches, Solver(correct, ("hessian",)), InMemory(model, None, ""), only=dense)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted(w.module_name for w in weights(model) if w.name in dense)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, inference_mode=True).save_pretrained(str(folder))
    return {
        "rank": rank,
        "matrices": len(modules),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "error_left": after / before if before else 0.0,
        "skipped": {SKIPPED: left} if left else {},
    }
