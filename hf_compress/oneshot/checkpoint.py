"""Compress a checkpoint folder that is larger than memory: one block is read, compressed, written and let go at a
time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_compress.allocator import trim
from hf_compress.calibration import Batch
from hf_compress.coverage import Coverage, coverage
from hf_compress.dequantize import fp8_blocks
from hf_compress.errors import CompressError
from hf_compress.families import expert_options
from hf_compress.oneshot.engine import Notes, OneshotReport, run_blocks
from hf_compress.oneshot.memory import fingerprint
from hf_compress.oneshot.solvers import Solver
from hf_compress.weights import KINDS, Weight, blocks_of, stored_scales, weights


class Container(Protocol):
    """How a folder stores matrices in fewer bits, for blocks that are written one by one."""

    quantization_config: dict[str, Any]
    notes: list[str]
    warning: str

    def encode(self, key: str, tensor: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """What is stored for the tensor `key` of a plain checkpoint: itself, or its codes and scales (`scale`: the one
        its values were rounded with, else found anew)."""

    def decode(self, key: str, stored: Callable[[str], Tensor]) -> Tensor:
        """The tensor back from what was stored (`stored(name)` reads one); KeyError when `key` was stored as it is."""


PIECE = 1 << 28  # bytes of a file of what is outside the blocks
MARKER = "unfinished.json"  # in the folder as long as it is not finished: see `_Marker`


def compress_checkpoint(
    source: Path,
    target: Path,
    batches: list[Batch],
    solver: Solver,
    *,
    only: Collection[str] | None = None,
    container: Container | None = None,
) -> tuple[OneshotReport, Coverage]:
    """As `compress_blocks`, from a safetensors folder of a causal model to another, packed when a container is given.

    Memory: one block and the activations; before them the embeddings, after them `PIECE` bytes of what is outside the
    blocks. FP8 block-scaled sources are read as bfloat16. Blocks are written as they are done to ``target.part``,
    which gets its name at the end; run again after an interruption, finished blocks are read back. Tensors outside
    the blocks are copied, unpacked where they are FP8, but for those that transformers does not load either
    (multi-token prediction): nothing here compresses them, and they would outweigh what does.

    Raises:
        CompressError: the target exists; a tensor the model needs is not in the source; a truncated shard; another
        run's unfinished target.
    """
    part = target.with_name(target.name + ".part")
    if (target / MARKER).exists():  # killed when it had its name and nothing else was left to do
        target.rename(part)
    if target.exists():
        raise CompressError("the target folder exists", where=str(target), next_step="choose another")
    part.mkdir(parents=True, exist_ok=True)
    packed = container.quantization_config if container is not None else None
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.glob("*.safetensors")]
    facts = [
        str(source.resolve()),
        sorted(stats),
        plain_config(source).to_dict(),
        solver.options,
        sorted(only) if only is not None else None,
        packed,
    ]
    stamp = fingerprint(facts, [], batches)
    marker = _Marker(part / MARKER, stamp)
    model = empty_model(source)
    store = _Streamed(model, _Files(source), part, container, marker)
    report = run_blocks(model, batches, solver, store, only=only)
    trim()
    report.dropped = store.finish(source)
    part.rename(target)
    (target / MARKER).unlink()
    left = {} if only is None else {w.name: "skipped by the recipe" for w in weights(model)}
    whole = empty_model(source)  # streaming cut the ties of the other
    return report, coverage(whole, report.touched, left)


def plain_config(source: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder, as if its weights were not packed."""
    config = AutoConfig.from_pretrained(source)
    config.__dict__.pop("quantization_config", None)
    return config


def empty_model(source: Path) -> PreTrainedModel:
    """The causal model of a checkpoint folder with its parameters on the meta device, in the checkpoint's dtype."""
    config = plain_config(source)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **expert_options(config))
    model.tie_weights()
    return model


class _Marker:
    """Which run a folder's blocks belong to, and what was noted of them; block -> `Notes` as a dict."""

    def __init__(self, path: Path, stamp: str) -> None:
        self.path, self.stamp, self.notes = path, stamp, dict[int, dict[str, Any]]()
        if path.exists():
            found = json.loads(path.read_text())
            if found["stamp"] != stamp:
                raise CompressError(
                    "an unfinished run with other options lies here",
                    where=str(path.parent),
                    next_step="remove it, or repeat that run's options",
                )
            self.notes = {int(block): notes for block, notes in found["notes"].items()}
        self._write()

    def note(self, block: int, notes: dict[str, Any]) -> None:
        self.notes[block] = notes
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps({"stamp": self.stamp, "notes": self.notes}))
        temporary.rename(self.path)


class _Files:
    """Tensors of a safetensors folder by key, each read when asked for, unpacked when `container` packed it."""

    def __init__(self, folder: Path, pattern: str = "*.safetensors", container: Container | None = None) -> None:
        self.folder, self.container, self.where = folder, container, dict[str, Path]()
        for file in sorted(folder.glob(pattern)):
            try:
                with safe_open(file, "pt") as opened:
                    self.where |= dict.fromkeys(opened.keys(), file)
            except Exception as error:
                raise CompressError(
                    f"cannot read this shard: {error}", where=str(file), next_step="download or copy it again"
                ) from error

    def __contains__(self, key: str) -> bool:
        return key in self.where

    def read(self, key: str) -> Tensor:
        if self.container is not None:
            try:
                return self.container.decode(key, self._stored)
            except KeyError:
                pass
        try:
            tensor = self._stored(key)
        except KeyError as error:
            raise CompressError(
                f"the checkpoint holds no {key!r}", where=str(self.folder), next_step="check that all shards are here"
            ) from error
        scale_key = f"{key}_scale_inv"
        return fp8_blocks(tensor, self._stored(scale_key)) if scale_key in self.where else tensor

    def _stored(self, key: str) -> Tensor:
        with safe_open(self.where[key], "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor


class _Streamed:
    """Blocks come from the source (or from the target, when done before) and go to the target; only one is ever in
    memory."""

    def __init__(
        self, model: PreTrainedModel, files: _Files, part: Path, container: Container | None, marker: _Marker
    ) -> None:
        self.model, self.files, self.part, self.container, self.marker = model, files, part, container, marker
        self.scales: dict[str, Tensor] = {}
        self.stacks: dict[str, list[Weight]] = {}  # stacked parameter -> its experts
        for weight in weights(model):
            if weight.expert is not None:
                self.stacks.setdefault(weight.parameter, []).append(weight)
        blocks = blocks_of(model)
        self.prefix = next(name for name, module in model.named_modules() if module is blocks) + "."
        for name, _ in [*model.named_parameters(), *model.named_buffers()]:
            if not name.startswith(self.prefix) and name in files:
                self._set(name, files.read(name))
        model.tie_weights()
        left = [name for name, p in model.named_parameters() if p.is_meta and not name.startswith(self.prefix)]
        if left:
            raise CompressError(
                f"the checkpoint holds no {left[0]!r}",
                where=str(files.folder),
                next_step="check that all shards are here",
            )

    def _shard(self, block: int) -> Path:
        return self.part / f"model-block-{block:05}.safetensors"

    def blocks_only(self) -> None:
        inside = {id(module) for module in blocks_of(self.model).modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                _let_go(module)

    def finished(self, block: int) -> bool:
        return self._shard(block).exists() and block in self.marker.notes  # others are of a run nobody vouches for

    def load(self, block: int) -> None:
        self._read(block, self.files)

    def restore(self, block: int) -> Notes:
        self._read(block, _Files(self.part, self._shard(block).name, self.container))
        return Notes(**self.marker.notes[block])

    def _read(self, block: int, files: _Files) -> None:
        module, parameters = blocks_of(self.model)[block], dict(self.model.named_parameters())
        for local, _ in [*module.named_parameters(), *module.named_buffers()]:
            name = f"{self.prefix}{block}.{local}"
            if name in self.stacks:
                self._set(name, self._stack(name, files))
            elif name in self.files or name in parameters:
                self._set(name, files.read(name))

    def _stack(self, name: str, files: _Files) -> Tensor:
        shape, stacked = self.model.get_parameter(name).shape, None
        for weight in self.stacks[name]:  # filled in place, so that no second copy of the experts exists
            one = torch.cat([files.read(key) for key in weight.stored])
            stacked = torch.empty(shape, dtype=one.dtype) if stacked is None else stacked
            stacked[weight.expert] = one
        assert stacked is not None
        return stacked

    def _set(self, name: str, tensor: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[attribute] = tensor

    def save(self, block: int, notes: Notes) -> None:
        module = blocks_of(self.model)[block]
        if not self.finished(block):
            tensors: dict[str, Tensor] = {}
            for local, value in [*module.named_parameters(), *module.named_buffers()]:
                name = f"{self.prefix}{block}.{local}"
                if name in self.stacks:
                    for weight in self.stacks[name]:
                        parts = value[weight.expert].chunk(len(weight.stored))
                        tensors |= dict(zip(weight.stored, parts, strict=True))
                elif name in self.files:
                    tensors[name] = value.detach()
            if self.container is not None:
                scales = stored_scales(self.model, self.scales)
                packed = (self.container.encode(key, tensors.pop(key), scales.get(key)) for key in list(tensors))
                tensors = {name: part for parts in packed for name, part in parts.items()}
            self.scales.clear()
            self.marker.note(block, asdict(notes))
            temporary = self._shard(block).with_suffix(".saving")
            save_file(tensors, temporary, {"format": "pt"})
            temporary.rename(self._shard(block))
        for child in module.modules():
            _let_go(child)

    def finish(self, source: Path) -> list[str]:
        """Everything outside the blocks, the index, and the small files; the tensors that are left out."""
        blocks = tuple(f"{self.prefix}{i}." for i in range(len(blocks_of(self.model))))
        piece: dict[str, Tensor] = {}
        number = 0
        wanted = {key for key in self.files.where if not key.endswith("_scale_inv")}
        dropped = _not_loaded(self.model, wanted)
        keys = [k for k in self.files.where if k in wanted - dropped and not k.startswith(blocks)]
        for place, key in enumerate(keys, 1):
            piece[key] = self.files.read(key)
            if place == len(keys) or sum(tensor.nbytes for tensor in piece.values()) >= PIECE:
                save_file(piece, self.part / f"model-rest-{number:05}.safetensors", {"format": "pt"})
                piece, number = {}, number + 1
        written = _Files(self.part)
        stored = set(written.where) | {k.rpartition("_")[0] for k in written.where}  # a container's parts: KEY_scale
        missing = wanted - dropped - stored
        if missing:
            raise CompressError(
                f"{len(missing)} tensors of the source were not written, such as {min(missing)!r}",
                where=str(self.part),
                next_step="report the architecture",
            )
        total = sum(file.stat().st_size for file in self.part.glob("*.safetensors"))
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: file.name for key, file in written.where.items()},
        }
        (self.part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for file in source.iterdir():
            if file.suffix in {".json", ".txt", ".model", ".jinja"} and not file.name.endswith(".index.json"):
                shutil.copy(file, self.part / file.name)
        config = json.loads((self.part / "config.json").read_text())
        if config.pop("quantization_config", None) is not None:
            config["dtype"] = "bfloat16"
        if self.container is not None:
            config["quantization_config"] = self.container.quantization_config
        (self.part / "config.json").write_text(json.dumps(config, indent=2))
        return sorted(dropped)


def _not_loaded(model: PreTrainedModel, keys: set[str]) -> set[str]:
    """Those of `keys` that from_pretrained passes over in silence: nothing of the model, and expected to lie there."""
    expressions = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    own |= {key for weight in weights(model, KINDS) for key in weight.stored}
    return {key for key in keys - own if any(re.search(expression, key) for expression in expressions)}


def _let_go(module: nn.Module) -> None:
    """The module's own parameters keep their shapes, and no memory."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[attribute] = nn.Parameter(parameter.to("meta"), requires_grad=False)
