"""Measure what a finished folder costs and how good it is, against the dense model, on this machine, in pairs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.backends.onnx import export_onnx
from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.data import Prepared
from hf_compress.errors import CompressError, did_you_mean
from hf_compress.families import family_of
from hf_compress.source import TASKS
from hf_compress.weights import weights

METRICS = ("quality", "kl", "size", "latency", "memory", "sparsity")
Predict = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Evaluate:
    """``evaluate: {metrics: [quality, size, latency, memory], batch_sizes: [1, 32], length: 32}``"""

    metrics: list[str] = field(default_factory=lambda: list(METRICS), metadata={"help": "among " + ", ".join(METRICS)})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "of the latency measure"})
    length: int = field(default=32, metadata={"help": "tokens a row of the latency measure"})
    repeats: int = field(default=20, metadata={"help": "interleaved rounds of the latency measure"})
    threads: int | None = field(default=None, metadata={"help": "of torch and onnxruntime alike; none = torch's own choice"})
    max_examples: int | None = field(default=None, metadata={"help": "rows of the quality measure; none = all"})
    compare_plain_onnx: bool = field(default=False, metadata={"help": "also measure the dense model exported to ONNX int8 without compression of ours"})

    def check(self) -> None:
        for metric in self.metrics:
            if metric not in METRICS:
                raise CompressError(f"unknown metric {metric!r}", where="evaluate.metrics", next_step=did_you_mean(metric, METRICS))


@dataclass
class Artefact:
    """Something that answers: a checkpoint folder in torch, or an ONNX file. `predict`: (batch of tensors) -> logits."""

    name: str
    predict: Predict
    weights_bytes: int
    model: PreTrainedModel | None = None


def open_folder(name: str, folder: str, task: str) -> Artefact:
    """A checkpoint through plain from_pretrained, in eval mode."""
    config = transformers.AutoConfig.from_pretrained(folder)
    options = {"experts_implementation": "eager"} if getattr(config, "num_experts_per_tok", None) and not torch.cuda.is_available() else {}
    model: PreTrainedModel = getattr(transformers, TASKS[task]).from_pretrained(folder, **options).eval()
    disable_cpu_packing(model)

    @torch.no_grad()
    def predict(batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**{k: v.to(model.device) for k, v in batch.items()}).logits
        return logits.float().cpu()

    return Artefact(name, predict, sum(p.stat().st_size for p in Path(folder).glob("*.safetensors") if p.name != "expectation.safetensors"), model)


def open_onnx(name: str, path: Path) -> Artefact:
    """An ONNX file in onnxruntime, on as many threads as torch uses."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(batch: dict[str, Tensor]) -> Tensor:
        (logits,) = session.run(None, {k: batch[k].numpy() for k in ("input_ids", "attention_mask")})
        return torch.from_numpy(logits)

    return Artefact(name, predict, path.stat().st_size)


def evaluate(folder: Path, dense: str, *, spec: Evaluate, prepared: Prepared, task: str, scratch: Path, seed: int = 0) -> dict[str, Any]:
    """JSON facts of ``{"machine", "settings", "artefacts": {"dense", "plain_onnx"?, "root", "onnx"?}}``.

    Quality differences are paired on the same examples with a 95% bootstrap interval; latencies are interleaved in one process and
    compared round by round; memory is what a fresh process holds more after loading and one forward.

    Raises:
        CompressError: logits that are not finite.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    artefacts = [open_folder("dense", dense, task), open_folder("root", str(folder), task)]
    files = sorted((folder / "onnx").glob("*.onnx"))
    artefacts += [open_onnx("onnx", files[0])] if files else []
    if spec.compare_plain_onnx and artefacts[0].model is not None:
        export_onnx(artefacts[0].model, scratch / "plain", plain=True)
        artefacts.insert(1, open_onnx("plain_onnx", scratch / "plain" / "onnx" / "model_quantized.onnx"))
    facts: dict[str, Any] = {"machine": machine_facts(), "settings": {"task": task, "threads": torch.get_num_threads(), "batch_sizes": spec.batch_sizes,
                             "length": spec.length, "repeats": spec.repeats, "seed": seed}, "artefacts": {a.name: {} for a in artefacts}}
    each = facts["artefacts"]
    for artefact in artefacts:
        if "size" in spec.metrics:
            each[artefact.name]["bytes"] = artefact.weights_bytes
        if artefact.model is not None and "size" in spec.metrics:
            each[artefact.name] |= parameter_counts(artefact.model)
        if artefact.model is not None and "sparsity" in spec.metrics:
            each[artefact.name]["sparsity"] = sparsity(artefact.model)
    if "quality" in spec.metrics:
        for name, found in quality(artefacts, prepared, task, spec.max_examples, with_kl="kl" in spec.metrics, seed=seed).items():
            each[name] |= found
    if "latency" in spec.metrics:
        made = torch.Generator().manual_seed(seed)
        for size in spec.batch_sizes:
            ids = torch.randint(5, artefacts[0].model.config.vocab_size if artefacts[0].model else 100, (size, spec.length), generator=made)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            timed = paired_latency({a.name: (lambda a=a: a.predict(batch)) for a in artefacts}, repeats=spec.repeats)  # type: ignore[misc]
            for name, found in timed.items():
                each[name].setdefault("latency", {})[str(size)] = found | {"rows_per_second": size / found["wall_ms"]["median"] * 1e3}
    if "memory" in spec.metrics:
        each["dense"]["memory_mb"], each["root"]["memory_mb"] = (memory_after_forward(f, task, spec.length) for f in (dense, str(folder)))
    return facts


def quality(artefacts: list[Artefact], prepared: Prepared, task: str, limit: int | None, *, with_kl: bool, seed: int) -> dict[str, dict[str, Any]]:
    """accuracy (classification) or perplexity (causal) of each artefact, and its paired difference to the first.

    Accuracy: points between 0 and 1. Perplexity: exp(sum nll / tokens); the difference is a ratio. KL(dense || artefact) and agreement of the
    top answer are means over examples (classification) or predicted tokens (causal).
    """
    rows = prepared.eval.select(range(min(len(prepared.eval), limit or len(prepared.eval))))
    per: dict[str, list[tuple[float, int]]] = {a.name: [] for a in artefacts}  # (correct, 1) or (summed nll, tokens) of each row
    divergence: dict[str, list[float]] = {a.name: [0.0, 0.0, 0.0] for a in artefacts}  # KL, agreements, count
    size = 32 if task == "text-classification" else 4
    for start in tqdm(range(0, len(rows), size), desc="quality", unit="batch"):
        batch = prepared.collator([rows[i] for i in range(start, min(start + size, len(rows)))])
        labels = batch.pop("labels")
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        reference: Tensor | None = None
        for artefact in artefacts:
            logits = artefact.predict(inputs)
            if not torch.isfinite(logits).all():
                raise CompressError("logits are not finite", where=f"evaluate: {artefact.name}, rows from {start}", next_step="check the stage before")
            if task == "text-classification":
                per[artefact.name] += [(float(ok), 1) for ok in logits.argmax(-1) == labels]
                flat = logits
            else:
                logits, target = logits[:, :-1], labels[:, 1:]
                nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none").view(target.shape)
                per[artefact.name] += [(float(a), int(b)) for a, b in zip(nll.sum(1), (target != -100).sum(1), strict=True)]
                flat = logits[target != -100]
            if with_kl:
                logs = flat.log_softmax(-1)
                reference = logs if reference is None else reference
                found = divergence[artefact.name]
                found[0] += float((reference.exp() * (reference - logs)).sum())
                found[1] += float((reference.argmax(-1) == logs.argmax(-1)).sum())
                found[2] += len(logs)
    base = torch.tensor(per[artefacts[0].name], dtype=torch.float64)
    result = {}
    for artefact in artefacts:
        ours = torch.tensor(per[artefact.name], dtype=torch.float64)
        name = "accuracy" if task == "text-classification" else "perplexity"
        result[artefact.name] = {name: {"value": _score(ours, task), "n": len(ours), "tokens": None if task == "text-classification" else int(ours[:, 1].sum())}}
        if artefact is not artefacts[0]:
            result[artefact.name][f"{name}_difference"] = paired_difference(base, ours, task, seed=seed)
            if with_kl:
                kl, same, count = divergence[artefact.name]
                result[artefact.name] |= {"kl_to_dense": kl / count, "agreement": same / count}
    return result


def _score(rows: Tensor, task: str) -> float:
    mean = rows[..., 0].sum(-1) / rows[..., 1].sum(-1)
    return float(mean) if task == "text-classification" else float(mean.exp())


def paired_difference(base: Tensor, ours: Tensor, task: str, *, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Point estimate and 95% bootstrap interval over examples of accuracy - accuracy, or perplexity / perplexity.

    base, ours: (examples, 2) of (correct, 1) or (summed nll, tokens), the same examples in the same order.
    """
    made = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        chosen = torch.randint(len(base), (len(base),), generator=made)
        values.append(_compare(base[chosen], ours[chosen], task))
    low, high = torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": _compare(base, ours, task), "low": low, "high": high}


def _compare(base: Tensor, ours: Tensor, task: str) -> float:
    return _score(ours, task) - _score(base, task) if task == "text-classification" else _score(ours, task) / _score(base, task)


def paired_latency(candidates: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 3) -> dict[str, dict[str, Any]]:
    """Wall and CPU milliseconds of each candidate, and how many times faster than the first it is.

    One call of each in turn, `repeats` rounds, so a busy moment hits neighbours alike. Speed-ups are the median over rounds of the first
    candidate's time over this one's in the same round, with quartiles.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(repeats), desc="latency", unit="round"):
        for name, call in candidates.items():
            started, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append((time.perf_counter() - started) * 1e3)
            cpu[name].append((time.process_time() - used) * 1e3)
    first = next(iter(candidates))
    result: dict[str, dict[str, Any]] = {}
    for name in candidates:
        result[name] = {"wall_ms": _spread(wall[name]), "cpu_ms": _spread(cpu[name])}
        if name != first:
            result[name] |= {"speedup_wall": _spread([a / b for a, b in zip(wall[first], wall[name], strict=True)]),
                             "speedup_cpu": _spread([a / b for a, b in zip(cpu[first], cpu[name], strict=True)])}
    return result


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": low, "high": high, "p95": statistics.quantiles(values, n=20)[-1]}


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """parameters, and active_parameters: those one token passes through (of routed experts, num_experts_per_tok)."""
    experts = family_of(model.config).experts
    total = idle = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            packed = type(module).__name__ == "Linear4bit" and not parameter.is_floating_point()
            total += int(module.in_features) * int(module.out_features) if packed else parameter.numel()  # type: ignore[call-overload]
    if experts is not None:
        active, count = getattr(model.config, experts.active), getattr(model.config, experts.count)
        idle = round(sum(w.shape[0] * w.shape[1] for w in weights(model, ["expert"])) * (1 - active / count))
    return {"parameters": total, "active_parameters": total - idle}


def sparsity(model: PreTrainedModel) -> float | None:
    """Share of exact zeros in the block matrices; None when they are packed."""
    found = weights(model)
    if any(not w.whole.is_floating_point() for w in found):
        return None
    return sum(int((w.matrix == 0).sum()) for w in found) / sum(w.shape[0] * w.shape[1] for w in found)


def memory_after_forward(folder: str, task: str, length: int) -> float:
    """MiB of anonymous memory a fresh process holds more after plain from_pretrained and one forward than before it."""
    code = ("import gc, sys, psutil, torch, transformers\n"
            "transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()\n"
            "auto = getattr(transformers, sys.argv[2]); info = psutil.Process().memory_info\n"
            "before = info().rss - info().shared\nmodel = auto.from_pretrained(sys.argv[1]).eval()\n"
            "with torch.no_grad(): model(input_ids=torch.full((1, int(sys.argv[3])), 7))\n"
            "gc.collect(); print('MB', (info().rss - info().shared - before) / 2**20)\n")
    done = subprocess.run([sys.executable, "-c", code, folder, TASKS[task], str(length)], capture_output=True, text=True)
    line = next((x for x in done.stdout.splitlines() if x.startswith("MB ")), None)
    if line is None:
        raise CompressError("the process that measures memory died", where=folder, next_step=done.stderr.strip()[-500:])
    return float(line.split()[1])


def machine_facts() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line] if Path("/proc/cpuinfo").exists() else []
    return {"cpu": names[0] if names else platform.processor(), "cores": psutil.cpu_count(), "load_average": round(os.getloadavg()[0], 2),
            "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def save_facts(facts: dict[str, Any], path: Path) -> None:
    """Write JSON through a temporary sibling, so that a full disk leaves no half file under the final name."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(facts, indent=2))
    temporary.rename(path)
