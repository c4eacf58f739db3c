"""One arm of `oneshot_pruning.py`, a process (for the peer an environment) of its own: prune, measure, write JSON.

    python tests/benchmarks/pruning_arm.py --library ours --method alps --pattern 2:4 --sparsity 0.5 \\
        --model FOLDER --tokens tokens.safetensors --seed 0 --out arm.json

CPU seconds and peak resident memory cover loading the model and pruning it, above the process with its libraries
imported. Perplexity and KL to the dense model are taken afterwards, for each held-out sequence.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)


class Peak:
    """The highest resident memory of this process, in MB above where it began, sampled every 10 ms."""

    def __enter__(self) -> Peak:
        self.begin = self.top = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.top = max(self.top, self._now())

    @staticmethod
    def _now() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return self.top - self.begin


def auto_class(folder: str) -> Any:
    classifies = AutoConfig.from_pretrained(folder).architectures[0].endswith("ForSequenceClassification")
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def load(folder: str, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = auto_class(folder).from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


def prune_by_peer(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    """llm-compressor on the same tokens, a sequence at a time, as it does by default."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]
    model = load(args.model)
    mask_structure = "0:0" if args.pattern == "unstructured" else args.pattern
    left = ["re:.*lm_head"]  # a plain "lm_head" is pruned all the same
    if getattr(model.config, "kv_lora_rank", None):
        left.append("re:.*kv_b_proj")  # MLA gives it four dimensions, and both modifiers fail on them
    recipe = kind(sparsity=args.sparsity, mask_structure=mask_structure, targets=["Linear"], ignore=left)
    rows = Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids])
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(args.model),
        recipe=recipe,
        dataset=rows,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    return model


def prune_by_us(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel | None:
    """In memory; streamed from disk to disk: None, and the result lies in `args.target`."""
    from hf_compress.families import expert_options
    from hf_compress.oneshot import compress_blocks, compress_checkpoint, solvers

    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    given = {"sparsity": args.sparsity, "pattern": args.pattern} | json.loads(args.options)
    solver = (
        solvers[args.method](**given)
        if args.method in solvers
        else solvers["criterion"](criterion=args.method, **given)
    )
    if args.library == "ours-streamed":
        compress_checkpoint(Path(args.model), args.target, batches, solver)
        return None
    model = load(args.model, **expert_options(AutoConfig.from_pretrained(args.model)))
    compress_blocks(model, batches, solver)
    return model


def held_out(tokens: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each held-out row and what it is to predict: its own next tokens, or the one class of `labels`."""
    if "labels" not in tokens:
        return [(row, row[1:]) for row in tokens["heldout"]]
    rows = zip(tokens["heldout"], tokens["lengths"].tolist(), tokens["labels"], strict=True)
    return [(row[:length], label[None]) for row, length, label in rows]


def log_probabilities(model: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    """(tokens - 1, vocabulary); of a classifier (1, classes)."""
    logits = model(row[None]).logits
    return torch.log_softmax((logits[0, :-1] if model.can_generate() else logits).float(), -1)


def nll(log_probability: torch.Tensor, wanted: torch.Tensor) -> float:
    return -log_probability.gather(1, wanted[:, None]).mean().item()


@torch.no_grad()
def dense_answers(args: argparse.Namespace, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The dense model's log-probabilities of the held-out rows (of text in fp16) and their mean nll, made once."""
    path = Path(args.tokens).with_suffix(".dense")
    if not path.exists():
        dense, rows = load(args.model), held_out(tokens)
        answered = [log_probabilities(dense, row) for row, _ in rows]
        nlls = torch.tensor([nll(one, to) for one, (_, to) in zip(answered, rows, strict=True)], dtype=torch.float64)
        part = path.with_suffix(".part")
        kept = torch.stack(answered)
        save_file({"nll": nlls, "log_probabilities": kept if "labels" in tokens else kept.half()}, part)
        part.rename(path)
    return load_file(path)


@torch.no_grad()
def answers(
    model: PreTrainedModel, dense: dict[str, torch.Tensor], tokens: dict[str, torch.Tensor]
) -> dict[str, list[float]]:
    """Mean negative log-likelihood of both and KL(dense, model), nats a prediction, of each held-out row; of a
    classifier also whether each is right."""
    found: dict[str, list[float]] = {"nll": [], "dense_nll": dense["nll"].tolist(), "kl": []}
    if "labels" in tokens:
        found |= {"right": [], "dense_right": []}
    for (row, wanted), theirs in zip(held_out(tokens), dense["log_probabilities"], strict=True):
        ours, theirs = log_probabilities(model, row), theirs.float()
        found["nll"].append(nll(ours, wanted))
        found["kl"].append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
        if "labels" in tokens:
            found["right"].append(float(ours.argmax() == wanted[0]))
            found["dense_right"].append(float(theirs.argmax() == wanted[0]))
    return found


def zeros(model: PreTrainedModel, pattern: str) -> dict[str, float]:
    """Share of zeros among the block matrices, and of groups that keep to N:M (1 where there is no such pattern)."""
    total = zero = groups = good = 0
    for name, value in model.named_parameters():
        if ".layers." in name and value.dim() >= 2 and "norm" not in name and not name.endswith("mlp.gate.weight"):
            total, zero = total + value.numel(), zero + int((value == 0).sum())
            if pattern != "unstructured":
                keep, of = map(int, pattern.split(":"))
                kept = (value.reshape(-1, of) != 0).sum(1)
                groups, good = groups + len(kept), good + int((kept <= keep).sum())
    return {"sparsity": zero / total, "valid_groups": good / groups if groups else 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["ours", "ours-streamed", "llm-compressor"], required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--options", default="{}", help="further options of our solver, as JSON")
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--tokens", required=True, help="safetensors with `heldout` and `calibration-SEED`, (rows, tokens)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = load_file(args.tokens)
    ours = args.library != "llm-compressor"
    args.target = args.out.with_suffix(".checkpoint")
    if ours:
        import hf_compress.oneshot
        import hf_compress.patterns  # noqa: F401  imported before memory and time count
    else:
        import llmcompressor.modifiers.pruning  # noqa: F401
    with Peak() as peak:
        wall, cpu = time.time(), time.process_time()
        pruned = (prune_by_us if ours else prune_by_peer)(args, tokens[f"calibration-{args.seed}"])
        cpu, wall = time.process_time() - cpu, time.time() - wall
    model = pruned or load(str(args.target))
    found: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("out", "model", "tokens", "target")}
    found |= {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": peak.megabytes} | zeros(model, args.pattern)
    if "heldout" in tokens:
        found |= answers(model.eval(), dense_answers(args, tokens), tokens)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(args.out)
    shutil.rmtree(args.target, ignore_errors=True)


if __name__ == "__main__":
    main()
