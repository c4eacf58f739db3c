"""One arm of `quantization_quality.py`, a process (for a peer an environment) of its own: quantize, measure, write.

    python tests/benchmarks/quantization_arm.py --library ours --method gptq --scheme w3 --group 64 \\
        --model FOLDER --tokens tokens.safetensors --seed 0 --out arm.json

Schemes: w8, w4, w3, w2 (symmetric integers in groups), nf4 (bitsandbytes' blocks of 64), int8 (its rows). CPU seconds
and peak resident memory cover loading the model and quantizing it, above the process with its libraries imported.
What it then answers, and KL to the dense model, are of the weights as their container decodes them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from pruning_arm import Peak, answers, auto_class, dense_answers, load

LEFT = ["re:.*lm_head"]  # a plain "lm_head" does not spare the head


def by_llm_compressor(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    """GPTQ at its strongest: scales searched under the inputs' importance, static act-order."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model = load(args.model)
    left = LEFT + (["re:.*kv_b_proj"] if getattr(model.config, "kv_lora_rank", None) else [])
    weights = QuantizationArgs(
        num_bits=int(args.scheme[1:]),
        symmetric=True,
        strategy="group",
        group_size=args.group,
        observer="imatrix_mse",
        actorder="static",
    )
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids])
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(args.model),
        recipe=GPTQModifier(config_groups={"group_0": group}, ignore=left),
        dataset=rows,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    return model


def by_auto_round(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    """200 iterations of 4 sequences: its default of 8 x 2048 tokens takes hours on two cores. In bfloat16, as is its
    default, where the processor has instructions for it, as ours does."""
    from auto_round import AutoRound

    found = torch.cpu.get_capabilities()

    model, tokenizer = load(args.model), AutoTokenizer.from_pretrained(args.model)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=int(args.scheme[1:]),
        group_size=args.group,
        sym=True,
        iters=args.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=4,
        dataset=rows,
        device_map="cpu",
        amp=bool(found.get("avx512_bf16") or found.get("amx_bf16")),
    )
    rounded, _ = rounding.quantize()
    return rounded


def by_optimum(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    """optimum's GPTQ (gptqmodel's solver) with act-order; its plain torch kernel answers."""
    from transformers import GPTQConfig

    rows = [{"input_ids": row[None].tolist(), "attention_mask": torch.ones_like(row)[None].tolist()} for row in ids]
    config = GPTQConfig(
        bits=int(args.scheme[1:]),
        group_size=args.group,
        sym=True,
        desc_act=True,
        act_group_aware=False,
        dataset=rows,
        backend="torch",
        model_seqlen=ids.shape[1],
    )
    model: PreTrainedModel = auto_class(args.model).from_pretrained(
        args.model, dtype=torch.float32, quantization_config=config
    )
    return model


def by_torchao(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    """Its weight-only integers, to the nearest: it takes no calibration text, and no stacked experts."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    from hf_compress.weights import weights

    model = load(args.model)
    names = {weight.module_name for weight in weights(model)}
    config = IntxWeightOnlyConfig(getattr(torch, f"int{args.scheme[1:]}"), granularity=PerGroup(args.group))
    quantize_(model, config, lambda _, name: name in names)
    return model


def distilled(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    """Tuned gptq, then three epochs over the same rows toward the dense model's answers (QAD), 512 tokens a step: with
    levels and scales, what is not rounded trains too (embeddings, head, norms, routers). Of `scales` two epochs, in
    which scales, norms and routers train alone, in bfloat16 where `calibrating` finds it faster."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from hf_compress import QAT, CompressionTrainer, Distillation
    from hf_compress.families import expert_options
    from hf_compress.precision import calibrating

    options = expert_options(AutoConfig.from_pretrained(args.model))
    model, alone = load(args.model, **options), args.method == "scales"
    start = {"method": "lsq", "start": "gptq", "samples": len(ids)} | args.options
    if alone:
        start |= {"method": "scales", "scale_rate": 1.0}
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        CompressionTrainer(
            model,
            techniques=[
                QAT(int(args.scheme[1:]), args.group, **start),
                Distillation(args.model, teacher_model_init_kwargs=options, temperature=1.0),
            ],
            task_weight=0.0,
            args=TrainingArguments(
                scratch,
                num_train_epochs=2 if alone else 3,
                learning_rate=3e-4 if alone else 1e-4,
                bf16=alone and calibrating(model, "cpu")._enabled,
                lr_scheduler_type="cosine",
                warmup_steps=4,
                weight_decay=0.0,
                adam_beta2=0.95,
                max_grad_norm=0.0,
                per_device_train_batch_size=max(1, 512 // ids.shape[1]),
                use_cpu=True,
                dataloader_pin_memory=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()]),
        ).train()
    return model


def by_us(args: argparse.Namespace, ids: torch.Tensor) -> PreTrainedModel:
    if args.method in ("qad", "scales"):
        return distilled(args, ids)
    from hf_compress.backends import backends
    from hf_compress.calibration import with_continuations
    from hf_compress.families import expert_options
    from hf_compress.oneshot import compress_blocks, solvers
    from hf_compress.weights import weights

    bits = 4 if args.scheme in ("nf4", "nf4-double") else 8 if args.scheme == "int8" else int(args.scheme[1:])
    entry = backends.entry("compressed-tensors" if args.scheme.startswith("w") else "bitsandbytes")
    options: dict[str, Any] = {"double_quant": True} if args.scheme == "nf4-double" else {}
    group = args.group if args.scheme.startswith("w") else None
    model = load(args.model, **expert_options(AutoConfig.from_pretrained(args.model)))
    solving = {key: value for key, value in args.options.items() if key != "continuations"}
    solver = solvers[args.method](grid=entry.traits["grid"](bits=bits, group_size=group, **options), **solving)
    stored = entry.traits["stores"]
    only = [w.name for w in weights(model) if not isinstance(stored(w, bits=bits, group_size=group), str)]
    parts = ids.split(max(2, 512 // ids.shape[1]))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]
    if solver.needs:
        batches = with_continuations(model, batches, args.options.get("continuations", 0), seed=args.seed)
    compress_blocks(model, batches if solver.needs else [], solver, only=only)
    return model


LIBRARIES = {
    "ours": by_us,
    "llm-compressor": by_llm_compressor,
    "auto-round": by_auto_round,
    "optimum": by_optimum,
    "torchao": by_torchao,
}
IMPORTS = {  # before memory and time count
    "ours": "hf_compress hf_compress.backends hf_compress.oneshot",
    "llm-compressor": "llmcompressor.modifiers.quantization",
    "auto-round": "auto_round",
    "optimum": "optimum.gptq gptqmodel",
    "torchao": "torchao.quantization hf_compress.weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=list(LIBRARIES), required=True)
    parser.add_argument("--method", default="", help="of ours: rtn, gptq, qad, scales")
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--options", type=json.loads, default={}, help="further options of our solver, as JSON")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors with `heldout` and `calibration-SEED`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = load_file(args.tokens)
    for module in IMPORTS[args.library].split():
        importlib.import_module(module)
    with Peak() as peak:
        wall, cpu = time.time(), time.process_time()
        model = LIBRARIES[args.library](args, tokens[f"calibration-{args.seed}"])
        cpu, wall = time.process_time() - cpu, time.time() - wall
    kept = ("library", "method", "scheme", "group", "options", "iterations", "seed")
    found: dict[str, Any] = {key: getattr(args, key) for key in kept}
    found |= {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": peak.megabytes}
    if args.library != "optimum":  # whose model refuses to be cast, and computes in fp32 as it was loaded
        model = model.float()
    found |= answers(model.eval(), dense_answers(args, tokens), tokens)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(args.out)


if __name__ == "__main__":
    main()
