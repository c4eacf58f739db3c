"""Measure what a finished folder costs and how good it is, against the dense model, on this machine, in pairs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_compress.backends.onnx import export_onnx
from hf_compress.bnb_guard import allow_cpu_packing
from hf_compress.data import Data, prepare
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.evaluation.artefacts import Artefact, open_elsewhere, open_folder, open_onnx
from hf_compress.evaluation.cost import machine_facts, memory_after_forward, paired_latency, parameter_counts, sparsity
from hf_compress.evaluation.quality import quality
from hf_compress.source import ModelSource, task_of, weight_files

METRICS = ("quality", "kl", "size", "latency", "memory", "sparsity")


@dataclass
class Evaluate:
    """``evaluate: {metrics: [quality, size, latency, memory], batch_sizes: [1, 32], length: 32}``"""

    metrics: list[str] = field(default_factory=lambda: list(METRICS), metadata={"help": "among " + ", ".join(METRICS)})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "of the latency measure"})
    length: int = field(default=32, metadata={"help": "tokens a row of the latency measure"})
    repeats: int = field(default=20, metadata={"help": "interleaved rounds of the latency measure"})
    threads: int | None = field(
        default=None, metadata={"help": "of torch and onnxruntime alike; none = torch's own choice"}
    )
    max_examples: int | None = field(default=None, metadata={"help": "rows of the quality measure; none = all"})
    compare_plain_onnx: bool = field(
        default=False,
        metadata={"help": "also measure the dense model exported to ONNX int8 without compression of ours"},
    )

    def check(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise CompressError(
                    f"unknown metric {metric!r}", where="evaluate.metrics", next_step=did_you_mean(metric, METRICS)
                )


def evaluate(
    folder: str | Path,
    dense: str | Path,
    *,
    spec: Evaluate | None = None,
    data: Data | None = None,
    task: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """``evaluate("out", "org/dense-model", data=Data("reviews.csv"))``: measure a finished folder against the dense
    model.

    Returns JSON facts, ``{"machine", "settings", "artefacts": {"dense", "plain_onnx"?, "root", "onnx"?}}``. Quality
    differences are paired on the same examples with a 95% bootstrap interval; latencies are interleaved in one process
    and compared round by round (of 4-bit bitsandbytes as it computes on this CPU: "repacked" where its kernel for
    AVX512-BF16 does, while quality is that of the stored codes); memory is what a fresh process holds more after
    loading and one forward. settings.device: cuda where a GPU holds both models and no copy for a runtime of the CPU
    stands beside them, else cpu.

    Raises:
        CompressError: quality without data; logits that are not finite.
    """
    spec, folder, dense = spec or Evaluate(), Path(folder), str(dense)
    spec.check()
    task = task or task_of(ModelSource(id=str(folder)), AutoConfig.from_pretrained(folder))
    if data is None and "quality" in spec.metrics:
        raise CompressError("measuring quality needs data", where="evaluate", next_step="give data, or other metrics")
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads or threads)
    try:
        return _measure(folder, dense, spec, data, task, seed)
    finally:
        torch.set_num_threads(threads)


def _tokenizer(*places: str | Path) -> PreTrainedTokenizerBase:
    for place in places:
        if not Path(place).is_dir() or (Path(place) / "tokenizer_config.json").exists():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            return tokenizer
    raise CompressError(
        "neither folder holds a tokenizer",
        where=f"evaluate: {', '.join(map(str, places))}",
        next_step="save one there: tokenizer.save_pretrained(folder), or quantize(..., tokenizer=tokenizer)",
    )


def _device(folder: Path, dense: str, spec: Evaluate) -> str:
    """One for all that is compared: the GPU where it holds both models, unpacked, and no copy for a runtime of the CPU
    stands beside them."""
    elsewhere = spec.compare_plain_onnx or (folder / "onnx").is_dir() or (folder / "openvino").is_dir()
    if elsewhere or not torch.cuda.is_available():
        return "cpu"
    need = sum(file.stat().st_size for file in weight_files(ModelSource(id=dense)))
    return "cuda" if torch.cuda.mem_get_info()[0] > 2.5 * need else "cpu"


def _measure(folder: Path, dense: str, spec: Evaluate, data: Data | None, task: str, seed: int) -> dict[str, Any]:
    device = _device(folder, dense, spec)
    facts = _compared(folder, dense, spec, data, task, seed, device)
    if "memory" in spec.metrics:  # once nothing of this process is in the way
        for name, place in (("dense", dense), ("root", str(folder))):
            facts["artefacts"][name]["memory_mb"] = memory_after_forward(place, task, spec.length, device)
    facts["settings"]["device"] = device
    return facts


def _compared(
    folder: Path, dense: str, spec: Evaluate, data: Data | None, task: str, seed: int, device: str
) -> dict[str, Any]:
    artefacts = [open_folder("dense", dense, task, device), open_folder("root", str(folder), task, device)]
    files = sorted((folder / "onnx").glob("*.onnx"))
    artefacts += [open_onnx("onnx", files[0])] if files else []
    artefacts += (
        [open_elsewhere("openvino", "openvino", folder / "openvino")] if (folder / "openvino").is_dir() else []
    )
    try:
        return _measured(artefacts, folder, dense, spec, data, task, seed)
    finally:
        for artefact in artefacts:
            artefact.close()


def _measured(
    artefacts: list[Artefact], folder: Path, dense: str, spec: Evaluate, data: Data | None, task: str, seed: int
) -> dict[str, Any]:
    if spec.compare_plain_onnx and artefacts[0].model is not None:
        with tempfile.TemporaryDirectory() as scratch:
            export_onnx(artefacts[0].model, Path(scratch), plain=True)
            artefacts.insert(1, open_onnx("plain_onnx", Path(scratch) / "onnx" / "model_quantized.onnx"))
    facts: dict[str, Any] = {
        "machine": machine_facts(),
        "settings": {
            "task": task,
            "threads": torch.get_num_threads(),
            "batch_sizes": spec.batch_sizes,
            "length": spec.length,
            "repeats": spec.repeats,
            "seed": seed,
        },
        "artefacts": {a.name: {} for a in artefacts},
    }
    each = facts["artefacts"]
    for artefact in artefacts:
        if "size" in spec.metrics:
            each[artefact.name]["bytes"] = artefact.weights_bytes
        if artefact.model is not None and "size" in spec.metrics:
            each[artefact.name] |= parameter_counts(artefact.model)
    if "quality" in spec.metrics and data is not None:
        prepared = prepare(data, _tokenizer(folder, dense), task=task)
        for name, found in quality(
            artefacts, prepared, task, spec.max_examples, with_kl="kl" in spec.metrics, seed=seed
        ).items():
            each[name] |= found
    if "sparsity" in spec.metrics:
        for artefact in artefacts:
            if artefact.model is not None:
                artefact.predict(
                    {"input_ids": torch.full((1, 4), 7), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
                )
                each[artefact.name]["sparsity"] = sparsity(artefact.model)
    if "latency" in spec.metrics:
        for artefact in artefacts:
            if artefact.model is not None and allow_cpu_packing(artefact.model):  # what else is measured of it was
                each[artefact.name]["repacked"] = True
        made = torch.Generator().manual_seed(seed)
        for size in spec.batch_sizes:
            ids = torch.randint(
                5,
                artefacts[0].model.config.vocab_size if artefacts[0].model else 100,
                (size, spec.length),
                generator=made,
            )
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            timed = paired_latency(
                {a.name: partial(a.predict, batch) for a in artefacts},
                repeats=spec.repeats,
                clocks={a.name: a.clock for a in artefacts if a.clock},
            )
            for name, found in timed.items():
                each[name].setdefault("latency", {})[str(size)] = found | {
                    "rows_per_second": size / found["wall_ms"]["median"] * 1e3
                }
    return facts
