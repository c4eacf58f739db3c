"""One arm of `distillation_cost.py`, a process (for TRL an environment) of its own: train a few steps, write JSON.

    python tests/benchmarks/distillation_arm.py --arm chunked --vocabulary 32000 --layers 58 --width 512 --out arm.json

Arms that run whole training steps (SGD, batches of one sequence, teacher as large as the student):
    floor     Trainer: the teacher's forward, and a plain step of the student
    whole     CompressionTrainer, forward KL and cross-entropy, from whole logits
    chunked   the same with chunked: true
    soft      chunked, forward KL without cross-entropy
    gkd       TRL's GKDTrainer with lmbda = 0 and beta = 0 (forward KL without cross-entropy)
Arms that run forward KL at T = 2 and its backward on given hidden states of student and teacher:
    loss-naive, loss-chunked, loss-trl (TRL's chunked divergence, as its DistillationTrainer calls it)
CPU seconds: of the thread that computes, a step each. Peak: anonymous memory above the
process with its libraries imported (loss arms: above the hidden states and weights too), sampled every 5 ms.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def anonymous() -> float:
    """MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


class Peak:
    def __enter__(self) -> Peak:
        self.begin = self.top = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.top = max(self.top, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return self.top - self.begin


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.thread_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.thread_time() - self._began)


def llama(args: argparse.Namespace, seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        tie_word_embeddings=False,
        max_position_embeddings=args.tokens,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with transformers.initialization.no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


class Floor(Trainer):
    teacher: PreTrainedModel

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        return super().compute_loss(model, inputs, *args, **kwargs)


def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def steps(args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset

    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, args.vocabulary, (args.tokens,), generator=made).tolist() for _ in range(args.steps)]
    settings: dict[str, Any] = {
        "output_dir": "unused",
        "max_steps": args.steps,
        "per_device_train_batch_size": 1,
        "optim": "sgd",
        "learning_rate": 1e-4,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
    }
    clock, rows = Clock(), Dataset.from_list([{"input_ids": row} for row in ids])
    if args.arm == "gkd":  # what it needs is imported before memory is watched
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    elif args.arm != "floor":
        from hf_compress import CompressionTrainer, Distillation
    with Peak() as peak:
        student, teacher = llama(args, 0), llama(args, 1).eval()
        common: dict[str, Any] = {"train_dataset": rows, "data_collator": batch, "callbacks": [clock]}
        trainer: Trainer
        if args.arm == "floor":
            floor = Floor(student, TrainingArguments(**settings), **common)
            floor.teacher = teacher.requires_grad_(False)
            trainer = floor
        elif args.arm == "gkd":
            options = GKDConfig(
                **settings, lmbda=0.0, beta=0.0, temperature=2.0, bf16=False, gradient_checkpointing=False
            )
            trainer = GKDTrainer(student, teacher, options, processing_class=words(), **common)
        else:
            technique = Distillation(teacher, temperature=2.0, chunked=args.arm != "whole")
            task_weight = 0.0 if args.arm == "soft" else 0.5
            trainer = CompressionTrainer(
                student, techniques=[technique], task_weight=task_weight, args=TrainingArguments(**settings), **common
            )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"cpu_seconds": clock.seconds, "peak_mb": peak.megabytes, "losses": losses}


def words() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def losses(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    heads = [nn.Linear(args.width, args.vocabulary, bias=False) for _ in range(2)]
    hidden, taught = torch.randn(1, args.tokens, args.width), torch.randn(1, args.tokens, args.width)
    heads[1].requires_grad_(False)

    def naive(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_p = (heads[1](taught) / 2).log_softmax(-1)
        log_q = (heads[0](x) / 2).log_softmax(-1)
        return 4 * nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / args.tokens

    if args.arm == "loss-trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones(1, args.tokens)

        def compute(x: torch.Tensor) -> torch.Tensor:
            weights = heads[0].weight, heads[1].weight
            found, _, _ = _chunked_divergence_loss(x, taught, *weights, mask, beta=0.0, temperature=2.0)
            return 4 * found
    elif args.arm == "loss-chunked":
        from hf_compress.techniques.chunked import Head, chunked_loss, online
        from hf_compress.techniques.soft_targets import Objective, SoftTargets

        def compute(x: torch.Tensor) -> torch.Tensor:
            objective = Objective(SoftTargets("forward_kl", 2.0), [online(Head(heads[1]), taught)])
            found, _ = chunked_loss(Head(heads[0]), x, torch.arange(args.tokens), objective, None)
            return found / args.tokens
    else:
        compute = naive
    seconds, values = [], []
    with Peak() as peak:
        for _ in range(args.steps):
            heads[0].weight.grad = None
            x, began = hidden.clone().requires_grad_(), time.thread_time()
            value = compute(x)
            value.backward()
            seconds.append(time.thread_time() - began)
            values.append(float(value.detach()))
    assert x.grad is not None
    assert heads[0].weight.grad is not None
    norms = [float(x.grad.norm()), float(heads[0].weight.grad.norm())]
    return {"cpu_seconds": seconds, "peak_mb": peak.megabytes, "losses": values, "gradients": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", required=True)
    for name in ("vocabulary", "layers", "width", "tokens", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = losses(args) if args.arm.startswith("loss-") else steps(args)
    temporary = args.out.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    temporary.rename(args.out)


if __name__ == "__main__":
    main()
