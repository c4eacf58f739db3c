"""Peak memory of one-shot Wanda on a DeepSeek-V3-shaped checkpoint larger than the limit it runs under, at one depth
and at twice it.

    python tests/benchmarks/oneshot_memory.py --layers 12 --limit-gb 1.5

The checkpoint is random and written shard by shard. The work runs in a process of its own; its anonymous memory is
sampled, and it is killed above the limit. Writes results/oneshot_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "max_position_embeddings": 1024,
}


def write_checkpoint(folder: Path, layers: int) -> int:
    """Bytes of a random checkpoint with `layers` blocks, one block in memory at a time."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    made = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, Any]] = {}
    total = 0
    for name, value in model.state_dict().items():
        shard = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        for pending in [s for s in shards if s not in (shard, "rest")]:
            save_file(shards.pop(pending), folder / f"model-{pending}.safetensors", {"format": "pt"})
        ones = value.dim() == 1 and not name.endswith("bias")
        real = torch.ones(value.shape) if ones else torch.randn(value.shape, generator=made) * 0.02
        real = real.to(torch.float32 if name.endswith("bias") else torch.bfloat16)
        total += real.nbytes
        parts = {name: real}
        if name.endswith(("gate_up_proj", "down_proj")) and real.dim() == 3:
            base, kind = name.rsplit(".", 1)
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            parts = {
                f"{base}.{e}.{n}.weight": half.clone()
                for e, one in enumerate(real)
                for n, half in zip(names, one.chunk(len(names)), strict=True)
            }
        shards.setdefault(shard, {}).update(parts)
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"model-{shard}.safetensors", {"format": "pt"})
    return total


def work(source: Path, target: Path) -> None:
    """The measured process: calibrated Wanda, then checks of what was written."""
    import torch

    torch.set_num_threads(1)
    from hf_compress.oneshot import compress_checkpoint, solvers

    ids = torch.randint(5, CONFIG["vocab_size"], (8, 128), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    report, touched = compress_checkpoint(
        source, target, batches, solvers["criterion"](criterion="wanda", sparsity=0.5)
    )
    worst = max(abs(s - 0.5) for s in report.sparsity.values())
    print(
        "RESULT"
        + json.dumps({"weights": len(report.touched), "worst_sparsity_error": worst, "coverage": touched.share})
    )


CHECK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
options = {"output_loading_info": True, "experts_implementation": "eager"}
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
with torch.no_grad():
    logits = model(torch.arange(5, 37)[None]).logits
pruned = [p for n, p in model.named_parameters() if n.endswith(("down_proj", "o_proj.weight"))]
zeros = [float((p == 0).float().mean()) for p in pruned]
lost = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
print(json.dumps({"lost": lost, "finite": bool(torch.isfinite(logits).all()), "zeros": [min(zeros), max(zeros)]}))
"""


def check(target: Path) -> dict[str, Any]:
    """Open the result as anyone would, in a process without hf_compress, and run it once."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHECK, str(target)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found["lost"], found
    assert found["finite"], found
    return found


def measure(source: Path, target: Path, limit: float) -> dict[str, Any]:
    """Run `work` in a process; sample its anonymous memory every 50 ms; kill it above `limit` GB."""
    started = time.time()
    command = [sys.executable, __file__, "--work", str(source), str(target)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak = idle = 0.0
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        except (FileNotFoundError, ProcessLookupError):
            break
        now = int(lines[0].split()[1]) / 1e6 if lines else 0.0
        peak = max(peak, now)
        if not target.with_name(target.name + ".part").exists() and not target.exists():
            idle = max(idle, now)
        if peak > limit:
            child.kill()
            raise SystemExit(f"above the limit: {peak:.2f} GB > {limit} GB")
        time.sleep(0.05)
    assert child.stdout is not None
    line = next(x for x in child.stdout.read().splitlines() if x.startswith("RESULT"))
    found = json.loads(line.removeprefix("RESULT"))
    return found | {"peak_gb": round(peak, 3), "idle_gb": round(idle, 3), "seconds": round(time.time() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--limit-gb", type=float, default=1.5)
    parser.add_argument("--work", nargs=2, type=Path)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for layers in (args.layers, 2 * args.layers):
            source, target = Path(scratch) / "source", Path(scratch) / "target"
            size = write_checkpoint(source, layers)
            runs.append(
                {"layers": layers, "checkpoint_gb": round(size / 1e9, 3)} | measure(source, target, args.limit_gb)
            )
            runs[-1]["opened"] = check(target)
            print(runs[-1])
            shutil.rmtree(source)
            shutil.rmtree(target)
    growth = runs[1]["peak_gb"] / runs[0]["peak_gb"]
    sizes, peaks = [r["checkpoint_gb"] for r in runs], [r["peak_gb"] for r in runs]
    record(
        "oneshot_memory",
        what=f"One-shot Wanda, streamed, on random DeepSeek-V3-shaped checkpoints of {sizes[0]} and {sizes[1]} GB: "
        f"peak anonymous memory of the process ({runs[0]['idle_gb']} GB of it before the first block).",
        command=f"python tests/benchmarks/oneshot_memory.py --layers {args.layers} --limit-gb {args.limit_gb}",
        figures=[
            figure(
                "checkpoint over the limit it ran under", min(sizes) / args.limit_gb, "> 1", min(sizes) > args.limit_gb
            ),
            figure("peak memory, GB", max(peaks), f"<= {args.limit_gb}", max(peaks) <= args.limit_gb, spread=peaks),
            figure("peak memory as depth doubles", growth, "< 1.1x", growth < 1.1),
            figure("opened by plain from_pretrained, no key lost, finite answers", 1.0, "yes", True),
        ],
        config=CONFIG,
        limit_gb=args.limit_gb,
        runs=runs,
    )
    print(f"peak grows {growth:.3f}x as depth doubles")


if __name__ == "__main__":
    main()
