"""Masks as they are kept: one bit a weight, and a hash that tells them from any others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.errors import CompressError


def packed(mask: Tensor) -> Tensor:
    """Boolean (out, in) -> (ceil(n / 8),) uint8, the first weight in the lowest bit, rows one after another."""
    bits = torch.nn.functional.pad(mask.flatten().cpu().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, int], *, where: str) -> Tensor:
    """Inverse of `packed`.

    Raises:
        CompressError: there are not as many bits as weights (a mask of another model).
    """
    size = shape[0] * shape[1]
    if len(bits) != -(-size // 8):
        raise CompressError(
            f"the mask has bits for {len(bits) * 8} weights, the matrix {size}: it is of another model",
            where=where,
            next_step="resume with the model and the recipe that were interrupted",
        )
    every = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return every.flatten()[:size].bool().view(shape)


def sha256(masks: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and bits of all masks, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {tuple(masks[name].shape)} ".encode())
        digest.update(packed(masks[name]).numpy().tobytes())
    return digest.hexdigest()
