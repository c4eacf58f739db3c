"""What an artefact costs: time in pairs, memory in a fresh process, parameters, zeros; and on which machine."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_compress.environments import clean_environment, python_for
from hf_compress.errors import CompressError
from hf_compress.families import family_of
from hf_compress.source import TASKS
from hf_compress.weights import is_packed, weights

INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def paired_latency(
    candidates: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    settle: int = 0,
    clocks: Mapping[str, Callable[[], dict[str, float]]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Wall and CPU milliseconds of each candidate, and how many times faster than the first it is.

    One call of each in turn, `repeats` rounds, so a busy moment hits neighbours alike. Speed-ups are the median over
    rounds of the first candidate's time over this one's in the same round, with quartiles. settle: calls before each
    timed one, so that the processor's caches hold what is its own, as in a server, and not what its neighbour left.
    clocks: of candidates that compute in another process, the seconds their last call took there.
    """
    elsewhere = clocks or {}
    for call in candidates.values():
        for _ in range(warmup):
            call()
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(repeats), desc="latency", unit="round"):
        for name, call in candidates.items():
            for _ in range(settle):
                call()
            started, used = time.perf_counter(), time.process_time()
            call()
            took = {"wall": time.perf_counter() - started, "cpu": time.process_time() - used}
            took = elsewhere[name]() if name in elsewhere else took
            wall[name].append(took["wall"] * 1e3)
            cpu[name].append(took["cpu"] * 1e3)
    first = next(iter(candidates))
    result: dict[str, dict[str, Any]] = {}
    for name in candidates:
        result[name] = {"wall_ms": _spread(wall[name]), "cpu_ms": _spread(cpu[name])}
        if name != first:
            result[name] |= {
                "speedup_wall": _spread([a / b for a, b in zip(wall[first], wall[name], strict=True)]),
                "speedup_cpu": _spread([a / b for a, b in zip(cpu[first], cpu[name], strict=True)]),
            }
    return result


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "p95": statistics.quantiles(values, n=20)[-1],
    }


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """parameters, and active_parameters: those one token passes through (of routed experts, num_experts_per_tok)."""
    experts, config = family_of(model.config).experts, copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):  # as the config says, since packed weights have other shapes
        model = type(model)(config)
    total, idle = sum(p.numel() for p in model.parameters()), 0
    if experts is not None:
        active, count = getattr(model.config, experts.active), getattr(model.config, experts.count)
        idle = round(sum(w.shape[0] * w.shape[1] for w in weights(model, ["expert"])) * (1 - active / count))
    return {"parameters": total, "active_parameters": total - idle}


def sparsity(model: PreTrainedModel) -> float | None:
    """Share of exact zeros in the block matrices; None when they stay packed. (compressed-tensors unpacks at the first
    forward.)"""
    found = weights(model)
    if any(is_packed(w.whole) for w in found):
        return None
    return sum(int((w.matrix == 0).sum()) for w in found) / sum(w.shape[0] * w.shape[1] for w in found)


def memory_after_forward(folder: str, task: str, length: int, device: str = "cpu") -> float:
    """MiB that a fresh process holds more after plain from_pretrained and one forward of `length` tokens than before
    it: resident memory, or, with `device` cuda, what is allocated there. Weights that are mapped from their file
    count, since the forward needs them in memory.

    Raises:
        CompressError: the process died.
    """
    code = (
        "import gc, sys, psutil, torch, transformers\n"
        "transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()\n"
        "auto = getattr(transformers, sys.argv[2]); rss = lambda: psutil.Process().memory_info().rss\n"
        "gpu = sys.argv[4] != 'cpu'\n"
        "place = {'device_map': {'': sys.argv[4]}} if torch.cuda.is_available() else {}\n"
        "before = rss()\nmodel = auto.from_pretrained(sys.argv[1], **place).eval()\n"
        "with torch.no_grad(): model(input_ids=torch.full((1, int(sys.argv[3])), 7, device=model.device))\n"
        "gc.collect(); held = torch.cuda.memory_allocated() if gpu else rss() - before\n"
        "print('MB', held / 2**20)\n"
    )
    python = python_for(Path(folder)) if Path(folder).is_dir() else Path(sys.executable)
    done = subprocess.run(
        [str(python), "-c", code, folder, TASKS[task], str(length), device],
        capture_output=True,
        text=True,
        env=None if python == Path(sys.executable) else clean_environment(),
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("MB ")), None)
    if line is None:
        raise CompressError(
            "the process that measures memory died", where=folder, next_step=done.stderr.strip()[-500:]
        )
    return float(line.split()[1])


def cpu_name(cpuinfo: str) -> str:
    """The processor with those of its instructions that decide how fast int8 and bf16 are, from the text of
    /proc/cpuinfo: one model name sells CPUs with and without them. ``AMD EPYC, avx2`` (no VNNI) makes at most two
    products of int8 in the time of one of fp32."""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return ", ".join([found.get("model name") or platform.processor(), *(f for f in INSTRUCTIONS if f in flags)])


def machine_facts() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    return {
        "cpu": cpu_name(cpuinfo.read_text() if cpuinfo.exists() else ""),
        "cores": psutil.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
