"""Peak memory of one-shot pruning on a random dense model of 3.5 GB, ours streamed against llm-compressor.

    python tests/benchmarks/pruning_memory.py --peer "$(hf-compress env add llm-compressor)" --tokenizer FOLDER

A Llama of 17 blocks in fp32, 8 x 512 random tokens, 2:4; each arm a process of its own (`pruning_arm.py`), one thread;
arms that are done are not run again. alps takes 2 iterations, 2 steps: that many more need no more memory. The weights
are random, so nothing is said of quality. Writes results/pruning_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record

ARMS = (("llm-compressor", "sparsegpt"), ("ours-streamed", "alps"))
SHORT = {"alps": {"iterations": 2, "steps": 2}}  # of our options
ROWS, LENGTH, VOCABULARY = 8, 512, 49152


def write_model(folder: Path, tokenizer: Path) -> float:
    """GB of a random fp32 Llama with the tokenizer of another folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=17,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    if not folder.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder.with_suffix(".part"))
        model.save_pretrained(folder.with_suffix(".part"), max_shard_size="500MB")
        folder.with_suffix(".part").rename(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def arm(library: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    out = args.output / f"{library}-{method}.json"
    if not out.exists():
        python = sys.executable if library.startswith("ours") else str(args.peer)
        command = [python, str(Path(__file__).with_name("pruning_arm.py")), "--library", library, "--method", method]
        command += ["--pattern", "2:4", "--sparsity", "0.5", "--options", json.dumps(SHORT.get(method, {}))]
        command += ["--model", str(args.output / "model"), "--tokens", str(args.output / "tokens.safetensors")]
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([*command, "--out", str(out)], check=True, env=os.environ | alone)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="python of an environment with llm-compressor")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with any tokenizer of 49152 tokens")
    parser.add_argument("--output", type=Path, default=Path("outputs/pruning_memory"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    size = write_model(args.output / "model", args.tokenizer)
    import torch
    from safetensors.torch import save_file

    ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    save_file({"calibration-0": ids}, args.output / "tokens.safetensors")
    runs = {f"{library} {method}": arm(library, method, args) for library, method in ARMS}
    ratio = runs["ours-streamed alps"]["peak_mb"] / runs["llm-compressor sparsegpt"]["peak_mb"]
    name = "alps streamed / llm-compressor SparseGPT: memory above idle"
    figures = [figure(name, ratio, "<= 0.5", ratio <= 0.5)]
    figures.append(figure("groups that keep to 2:4", min(r["valid_groups"] for r in runs.values()), "-", True))
    record(
        "pruning_memory",
        what=f"One-shot pruning, 2:4, of a random Llama of {size:.2f} GB in fp32 on {ROWS} x {LENGTH} random tokens: "
        "peak resident memory above the process with its libraries imported.",
        command="python tests/benchmarks/pruning_memory.py --peer PYTHON --tokenizer FOLDER",
        figures=figures,
        peak_mb={name: run["peak_mb"] for name, run in runs.items()},
        seconds={name: run["cpu_seconds"] for name, run in runs.items()},
    )


if __name__ == "__main__":
    main()
