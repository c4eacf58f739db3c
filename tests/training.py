"""Tiny runs for the training tests: rows of uneven length, and a trainer around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from hf_compress.techniques import Technique
from hf_compress.trainer import CompressionTrainer
from tests.models import tiny


def rows(count: int = 16, *, classes: bool = False) -> Dataset:
    made = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 128, (5 + 3 * (i % 4),), generator=made).tolist() for i in range(count)]
    return Dataset.from_list([{"input_ids": x, "labels": i % 2 if classes else x} for i, x in enumerate(ids)])


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(r["input_ids"]) for r in batch)
    ids = torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in batch])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch])
    labels = (
        torch.tensor([r["labels"] for r in batch])
        if isinstance(batch[0]["labels"], int)
        else ids.masked_fill(mask == 0, -100)
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer(model: PreTrainedModel, folder: Path, techniques: list[Technique], **args: Any) -> CompressionTrainer:
    task_weight = args.pop("task_weight", 1.0)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    data = rows(classes=model.config.model_type == "bert")
    return CompressionTrainer(
        model,
        techniques=techniques,
        task_weight=task_weight,
        args=TrainingArguments(str(folder), **(settings | args)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )


WORDS = ["[PAD]", "[UNK]", "[EOS]", "good", "bad", "film", "plot", "very", "not", "slow", "bright", "dull"]


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    """A word-level tokenizer as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)
    return folder


def save_reviews(path: Path, count: int = 80) -> Path:
    """A csv of short texts with a label that their words decide."""
    made = torch.Generator().manual_seed(3)
    lines = ["text,label,source"]
    for i in range(count):
        words = [WORDS[int(w)] for w in torch.randint(5, len(WORDS), (6,), generator=made)]
        lines.append(
            f"{' '.join([('good', 'bad')[i % 2], *words])},{('pos', 'neg')[i % 2]},{'a' if i % 4 < 3 else 'b'}"
        )
    path.write_text("\n".join(lines))
    return path


def decoder_recipe(folder: Path, family: str) -> dict[str, Any]:
    """Of a tiny causal model in ``folder/model`` and packed rows of 16 tokens, without stages yet."""
    tiny(family, vocab_size=len(WORDS)).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    data = {"id": str(save_reviews(folder / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True}
    return {"name": "x", "model": {"id": str(folder / "model")}, "data": data}
