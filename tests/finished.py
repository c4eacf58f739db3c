"""Small finished folders of every kind of container, made once a session by the pipeline itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_compress.pipeline import compress
from hf_compress.recipe import parse
from tests.models import CONFIGS, tiny
from tests.training import WORDS, save_reviews, save_tokenizer

ARGS = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "disable_tqdm": True}
KINDS = ("experts", "decoder", "classifier")


def recipe(kind: str, root: Path) -> dict[str, Any]:
    """experts: compressed-tensors; decoder: pruned, trained, bitsandbytes; classifier: ONNX beside bitsandbytes."""
    data: dict[str, Any] = {"id": str(save_reviews(root / "reviews.csv")), "eval_size": 16}
    if kind == "classifier":
        config = CONFIGS["bert"] | {"model_type": "bert"}
        model = {"config": config, "tokenizer": str(save_tokenizer(root / "tok")), "task": "text-classification"}
        stages = [{"export": {"format": "onnx"}}, {"quantize": {"backend": "bitsandbytes", "bits": 8}}]
        measured = {"metrics": ["quality", "kl", "size"]}
        return {"name": kind, "model": model, "data": data, "stages": stages, "evaluate": measured}
    family = "deepseek_v3" if kind == "experts" else "llama"
    tiny(family, vocab_size=len(WORDS)).save_pretrained(root / "model")
    save_tokenizer(root / "model")
    (root / "model" / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    (root / "model" / "LICENSE").write_text("MIT License\n\nCopyright (c) the makers of the base\n")
    quantize: dict[str, Any] = {"backend": "compressed-tensors", "bits": 4, "group_size": 32}
    stages = [{"quantize": quantize}]
    if kind == "decoder":
        hold = {"sparsity": 0.5, "schedule": "constant"}
        train = {"distill": {"teacher_model": "dense"}, "prune": hold, "task_weight": 0.0, "args": dict(ARGS)}
        stages = [
            {"prune": {"criterion": "wanda", "sparsity": 0.5, "samples": 8}},
            {"name": "recover", "train": train},
        ]
        stages.append({"quantize": {"backend": "bitsandbytes", "bits": 4}})
    return {
        "name": kind,
        "model": {"id": str(root / "model")},
        "data": data | {"max_length": 16, "packing": True},
        "stages": stages,
        "evaluate": {"metrics": ["quality", "kl", "size", "sparsity"]},
    }


def make(kind: str, root: Path) -> Path:
    """``root/out``, and beside it what it was made from."""
    root.mkdir()
    return compress(parse(recipe(kind, root)), root / "out", command=f"hf-compress run {root}/r.yaml").folder
