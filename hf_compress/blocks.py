"""What each block of a checkpoint stores: bits a weight and zeros, read from its safetensors files."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_compress.source import ModelSource, load_meta
from hf_compress.weights import weights

_PART = re.compile(  # a matrix, its scales, its codes
    r"(?P<module>.*)\.(?:weight|SCB|qweight|qzeros|scales|g_idx)(?:[._].*)?"
)
_TORCHAO = re.compile(r"\._(\w+)_(?:qdata|scale|zero_point)$")  # the same, of the parameter named between


def block_profile(folder: Path, task: str, *, zeros: bool) -> list[dict[str, Any]]:
    """One entry for each block and kind of matrix: {block, kind, parameters, bits, zeros}.

    bits: all that is stored of these matrices (codes, scales, tables) in bits, over their number of weights.
    zeros: share of exact zeros, when asked for and where the file holds the values themselves; else None. Reads the
    files one tensor at a time, and their headers only when zeros are not asked for.
    """
    kinds, parameters = dict[str, tuple[int, str]](), defaultdict[tuple[int, str], int](int)
    for weight in weights(load_meta(ModelSource(id=str(folder), task=task))):
        assert weight.block is not None
        place = (weight.block, weight.kind)
        parameters[place] += weight.shape[0] * weight.shape[1]
        kinds |= {key.removesuffix(".weight"): place for key in (*weight.stored, weight.parameter)}
    stored, empty = defaultdict[tuple[int, str], int](int), defaultdict[tuple[int, str], int](int)
    packed = set[tuple[int, str]]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                parameter = _TORCHAO.sub(r".\1", name)
                match = _PART.fullmatch(parameter)
                place_of = kinds.get(match["module"] if match else parameter)
                if place_of is None:
                    continue
                part = file.get_slice(name)
                stored[place_of] += _count(part.get_shape()) * _BITS.get(part.get_dtype(), 8)
                whole = name.endswith(".weight") and part.get_dtype() in ("F32", "F16", "BF16", "F64")
                if whole and zeros:
                    empty[place_of] += int((file.get_tensor(name) == 0).sum())
                elif not whole:
                    packed.add(place_of)
    return [
        {
            "block": place[0],
            "kind": place[1],
            "parameters": count,
            "bits": stored[place] / count,
            "zeros": empty[place] / count if zeros and place not in packed else None,
        }
        for place, count in sorted(parameters.items())
    ]


_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8} | {
    kind: int(kind.lstrip("IU")) for kind in ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
}


def _count(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
