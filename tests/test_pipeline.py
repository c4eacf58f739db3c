"""Recipes end to end on tiny models, and every mistake as a person would see it."""

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_compress import pipeline, quantize
from hf_compress.card import render_card, without_folders
from hf_compress.errors import CompressError
from hf_compress.families import expert_options
from hf_compress.finished import Finished
from hf_compress.pipeline import compress, measure_again
from hf_compress.planning import plan, require_possible
from hf_compress.precision import bfloat16_is_fast
from hf_compress.recipe import load, parse, shipped
from hf_compress.stages import Train
from hf_compress.stages.interruption import StopAfterSaving, last_whole_checkpoint
from hf_compress.stages.train import _logged_every
from hf_compress.techniques.distillation import Distillation
from hf_compress.trainer import CompressionTrainer
from hf_compress.verification import verify_names, write_expectation
from tests.models import CONFIGS, tiny
from tests.training import WORDS, save_reviews, save_tokenizer

ARGS = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "disable_tqdm": True}


@pytest.fixture
def classifier(tmp_path: Path) -> dict[str, Any]:
    """Prune-free: fine-tune, shrink, distil, export, int8."""
    config = CONFIGS["bert"] | {"model_type": "bert", "num_hidden_layers": 3}
    return {
        "name": "tiny",
        "model": {"config": config, "tokenizer": str(save_tokenizer(tmp_path / "tok")), "task": "text-classification"},
        "data": {"id": str(save_reviews(tmp_path / "reviews.csv")), "eval_size": 16},
        "baseline": "finetune",
        "stages": [
            {"name": "finetune", "train": {"args": dict(ARGS)}},
            {"shrink": {"layers": [0, 2], "ffn": 64}},
            {
                "name": "distil",
                "train": {
                    "distill": {"teacher_model": "dense", "layer_map": "record", "features": {"hidden_mse": 0.5}},
                    "args": dict(ARGS),
                },
            },
            {"export": {"format": "onnx"}},
            {"quantize": {"backend": "bitsandbytes", "bits": 8, "options": {"dtype": "float16"}}},
        ],
        "evaluate": {"batch_sizes": [1], "length": 8, "repeats": 5, "compare_plain_onnx": True},
    }


@pytest.fixture
def decoder(tmp_path: Path) -> dict[str, Any]:
    """One-shot prune, recover under the mask, 4 bits with experts."""
    tiny("deepseek_v3", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    hold = {"sparsity": 0.5, "schedule": "constant", "pattern": "2:4"}
    return {
        "name": "tiny-moe",
        "model": {"id": str(tmp_path / "model")},
        "data": {
            "id": str(save_reviews(tmp_path / "reviews.csv")),
            "eval_size": 16,
            "max_length": 16,
            "packing": True,
        },
        "stages": [
            {"prune": {"criterion": "wanda", "sparsity": 0.5, "pattern": "2:4", "samples": 16}},
            {
                "name": "recover",
                "train": {
                    "distill": {"teacher_model": "dense"},
                    "prune": hold,
                    "task_weight": 0.0,
                    "args": dict(ARGS),
                },
            },
            {"quantize": {"backend": "compressed-tensors", "bits": 4, "group_size": 32}},
        ],
        "evaluate": {"metrics": ["quality", "kl", "size", "sparsity"]},
    }


def test_classifier_from_recipe_to_card(classifier: dict[str, Any], tmp_path: Path) -> None:
    result = compress(parse(classifier), tmp_path / "out")
    found = result.facts["evaluation"]["artefacts"]
    assert list(found) == ["dense", "plain_onnx", "root", "onnx"]
    assert result.facts["stages"][2]["facts"]["techniques"]["Distillation"]["layer_map"] == [0, 2]  # as shrink kept
    assert found["root"]["bytes"] < found["dense"]["bytes"] / 2
    assert all(
        "accuracy_difference" in found[n] and found[n]["latency"]["1"]["speedup_wall"]
        for n in ("plain_onnx", "root", "onnx")
    )
    assert (tmp_path / "out" / "onnx" / "model_quantized.onnx").stat().st_size == found["onnx"]["bytes"]
    assert result.facts["verify"]["onnx_difference"] < 1e-3
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{100 * found['onnx']['accuracy']['value']:.2f}%" in card
    with pytest.raises(CompressError, match="exists"):
        compress(parse(classifier), tmp_path / "out")


def test_blocks_first_then_answers(classifier: dict[str, Any], tmp_path: Path) -> None:
    """As README shows it: two stages, the first without labels and without the teacher's answers."""
    blocks = {"teacher_model": "dense", "weight": 0, "features": {"relations": 1, "hidden_cosine": 1}}
    args = ARGS | {"logging_steps": 1}
    first = {"distill": blocks | {"layer_map": "record"}, "task_weight": 0, "args": args}
    second = {"distill": {"teacher_model": "dense"}, "args": dict(args)}
    classifier["stages"][2:] = [{"train": first}, {"train": second}]
    classifier["evaluate"] = {"metrics": ["size"]}
    result = compress(parse(classifier), tmp_path / "out")
    logs = [stage["facts"]["log"][-1] for stage in result.facts["stages"][2:]]
    assert logs[0]["loss_relations"] > 0
    assert logs[0]["loss_task"] == 0
    assert "loss_distill" not in logs[0]
    assert logs[1]["loss_distill"] > 0


def test_a_record_of_layers_needs_a_shrink_stage(decoder: dict[str, Any], tmp_path: Path) -> None:
    decoder["stages"][1]["train"]["distill"] |= {"layer_map": "record", "features": {"cka": 1.0}}
    with pytest.raises(CompressError, match="no shrink stage"):
        compress(parse(decoder), tmp_path / "out")


def test_decoder_keeps_its_zeros_and_covers_its_experts(decoder: dict[str, Any], tmp_path: Path) -> None:
    facts = compress(parse(decoder), tmp_path / "out").facts
    prune, recover, quantize = facts["stages"]
    assert quantize["coverage"]["experts"] == 1.0
    assert prune["facts"]["mean_sparsity"] == 0.5
    assert recover["facts"]["techniques"]["Pruning"]["sparsity"] == 0.5
    assert facts["evaluation"]["artefacts"]["root"]["perplexity"]["tokens"] > 0
    assert [entry["step"] for entry in recover["facts"]["log"]] == [1, 2, 3, 4]
    assert "![Loss and its terms" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    for expert in model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]:
        assert ((expert.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_an_interrupted_run_goes_on_and_ends_the_same(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(parse(decoder), tmp_path / "whole").facts
    run, runs = Train.run, []

    def die(self: Train, work: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Train, "run", die)
    with pytest.raises(KeyboardInterrupt):
        compress(parse(decoder), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(Train, "run", run)
    monkeypatch.setattr("hf_compress.stages.prune.compress_blocks", lambda *a, **k: runs.append(1))
    again = compress(parse(decoder), tmp_path / "again").facts
    assert runs == []  # the finished prune stage was not redone
    assert again["evaluation"]["artefacts"] == whole["evaluation"]["artefacts"]


def test_measured_again_where_it_is_run(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder["stages"] = [
        {"quantize": {"backend": "compressed-tensors", "bits": 4, "group_size": 32, "streaming": True}}
    ]
    before = compress(parse(decoder), tmp_path / "out").facts
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    after = measure_again(tmp_path / "out", str(tmp_path / "model"))
    assert json.loads((tmp_path / "out" / "hf_compress.json").read_text()) == json.loads(json.dumps(after))
    assert after["evaluation"]["settings"]["threads"] == 64
    root = after["evaluation"]["artefacts"]["root"]
    kl = root.pop("kl_to_dense")
    assert kl == pytest.approx(
        before["evaluation"]["artefacts"]["root"].pop("kl_to_dense"), rel=1e-5
    )  # last digits of a sum
    assert root == before["evaluation"]["artefacts"]["root"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "64 threads" in card
    (result,) = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(root["perplexity"]["value"], 4)
    assert ModelCard(card).data.eval_results[0].metric_type == "perplexity"


@pytest.mark.parametrize("training", [False, True])
def test_a_skip_that_finds_nothing_is_refused_by_the_plan(decoder: dict[str, Any], training: bool) -> None:
    prune = {"sparsity": 0.5, "skip": ["layerz.0"]}
    decoder["stages"] = [{"train": {"prune": prune}} if training else {"prune": prune}]
    notes = [note for row in plan(parse(decoder)) for note in row.notes]
    assert any("REFUSED" in note and "did you mean 'layers.0'" in note for note in notes)


def test_the_plan_says_how_much_text_is_read(decoder: dict[str, Any]) -> None:
    args = {"max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    gptq = {"backend": "compressed-tensors", "bits": 4, "group_size": 32, "method": "gptq", "samples": 8}
    decoder["stages"] = [
        {"prune": {"sparsity": 0.5, "samples": 8}},
        {"train": {"args": args}},
        {"train": {"args": {"num_train_epochs": 1.5}}},
        {"quantize": gptq | {"continuations": 1}},
    ]
    _, prune, train, again, quantize = [[n for n in row.notes if "tokens" in n] for row in plan(parse(decoder))]
    few = "less than 2 for each of the 128 inputs of the widest matrix: raise samples, or continuations"
    assert prune == [f"calibrates on up to 128 tokens, {few}"]
    assert train == ["trains 7 steps of 8 rows, each of up to 16 tokens"]
    assert again == ["trains 1.5 epochs in steps of 8 rows, each of up to 16 tokens"]
    assert quantize == ["calibrates on up to 256 tokens, 128 of them written by the model"]
    many = plan(parse(change(decoder, "stages/3/quantize/continuations", 100_000)))[-1].notes
    assert any("12,800,000 of them written by the model (token by token; more than 7 continuations" in n for n in many)


def test_bitsandbytes_is_refused_for_experts_by_coverage(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder["stages"] = [{"quantize": {"backend": "bitsandbytes", "bits": 8}}]
    assert any("REFUSED" in note for row in plan(parse(decoder)) for note in row.notes)
    monkeypatch.setattr(pipeline, "load_model", None)  # refused before a weight is read
    with pytest.raises(CompressError, match=r"below min_coverage.*stacked experts"):
        compress(parse(decoder), tmp_path / "out")


def test_another_licence_than_the_models_is_refused_before_any_work(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model" / "README.md").write_text("---\nlicense: llama3\n---\n")
    monkeypatch.setattr(pipeline, "load_model", None)
    with pytest.raises(CompressError, match="the recipe says 'mit', the model itself 'llama3'"):
        compress(parse(decoder | {"license": "mit"}), tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Merge lora module")  # merging rounds again: that is what this recipe asks for
def test_training_after_quantize_needs_and_takes_lora(decoder: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    train = {"distill": {"teacher_model": "dense"}, "task_weight": 0.0, "args": dict(ARGS)}
    decoder["stages"] = [{"quantize": {"backend": "bitsandbytes", "bits": 4}}, {"train": train}]
    with pytest.raises(CompressError, match="only through LoRA"):
        parse(decoder)
    train["lora"] = {"r": 4}
    facts = compress(parse(decoder), tmp_path / "out").facts
    assert facts["stages"][1]["facts"]["steps"] == 4
    assert "Linear4bit" in str(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_dropout_is_set_for_the_stage_alone(
    classifier: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[set[float]] = []
    train, save = CompressionTrainer.train, Finished.save

    def of(model: Any) -> set[float]:
        return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}

    def watch_train(self: CompressionTrainer, **kwargs: Any) -> Any:
        rates.append(of(self.model))
        return train(self, **kwargs)

    def watch_save(self: Any, done: Any, *rest: Any) -> None:
        rates.append(of(done.model))
        save(self, done, *rest)

    monkeypatch.setattr(CompressionTrainer, "train", watch_train)
    monkeypatch.setattr(Finished, "save", watch_save)
    classifier["stages"], classifier["evaluate"] = classifier["stages"][:1], None
    classifier["stages"][0]["train"]["dropout"] = 0.0
    compress(parse(classifier), tmp_path / "out")
    assert rates == [{0.1}, {0.0}, {0.1}]


def test_classifiers_keep_the_names_of_their_labels(classifier: dict[str, Any], tmp_path: Path) -> None:
    classifier["stages"], classifier["evaluate"] = classifier["stages"][:1], None
    compress(parse(classifier), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "neg", "1": "pos"}
    classifier["model"]["num_labels"] = 3
    classifier["model"]["config"]["num_labels"] = 3
    with pytest.raises(CompressError, match=r"the data has 2 labels \(neg, pos\), the model 3"):
        compress(parse(classifier), tmp_path / "three")


def test_a_recipe_that_is_not_yaml_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\nmodel: {id: y\nstages: []\n")
    with pytest.raises(CompressError, match=r"bad.yaml, line 3, column"):
        load(str(tmp_path / "bad.yaml"))


def test_what_was_done_stands_in_the_card(decoder: dict[str, Any], tmp_path: Path) -> None:
    decoder["stages"], decoder["evaluate"]["metrics"] = decoder["stages"][:1], ["quality"]
    compress(parse(decoder), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`{criterion: wanda, sparsity: 0.5, pattern: '2:4', samples: 16}`" in card
    assert "Calibrated or measured on" in card
    assert "interleaved" not in card


def test_what_a_technique_has_to_say_stands_in_the_card(decoder: dict[str, Any], tmp_path: Path) -> None:
    train = {"qat": {"kind": "powers"}, "args": {"max_steps": 1, "disable_tqdm": True}}
    decoder["stages"], decoder["evaluate"]["metrics"] = [{"train": train}], ["size"]
    compress(parse(decoder), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "  - no container stores powers with a row: the values stand in a plain checkpoint" in card


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        ({"max_steps": 12}, 1),
        ({"max_steps": 200}, 10),
        ({"max_steps": 1000}, 20),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 4),  # of 80
    ],
)
def test_every_run_has_a_loss_curve(args: dict[str, Any], steps: int, tmp_path: Path) -> None:
    arguments = Train(args=args)._arguments(str(tmp_path), 0)
    assert _logged_every(arguments, Dataset.from_dict({"x": range(320)})) == steps


def test_lora_on_some_modules_covers_some(decoder: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    decoder["stages"] = [{"train": {"lora": {"r": 4, "target_modules": ["q_proj"]}, "args": dict(ARGS)}}]
    facts = compress(parse(decoder), tmp_path / "out").facts
    found = facts["stages"][0]["coverage"]
    assert 0 < found["share"] < 0.2
    assert "model.layers.0.self_attn.k_proj.weight" in found["skipped"]["not selected"]


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_auto_asks_the_machine(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.stages.train.bfloat16_is_fast", lambda device: fast)
    stage = Train(args={"bf16": "auto"})
    stage.check([], where="stages[0].train")
    assert stage._arguments("unused", 0).bf16 is fast


def test_bf16_auto_asks_for_the_device_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("hf_compress.stages.train.bfloat16_is_fast", lambda device: bool(asked.append(device)))
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        Train(args={"bf16": "auto", "use_cpu": True})._arguments("unused", 0)
    Train(args={"bf16": "auto"})._arguments("unused", 0)
    assert asked == ["cpu", "cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize(
    ("has", "fast"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "avx512_vnni": True}, False)],
)
def test_a_cpu_is_fast_by_its_instructions(has: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has)
    assert bfloat16_is_fast.__wrapped__("cpu") is fast
    assert not bfloat16_is_fast.__wrapped__("mps")


def test_lora_under_a_mask_is_merged_with_its_zeros(decoder: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    prune = {"pattern": "2:4", "begin": "1 step", "end": "0.5 epochs", "every": 1}
    distill = {"teacher_model": "base"}
    train = {"lora": {"r": 4, "target_modules": "all-linear"}, "prune": prune, "distill": distill, "args": dict(ARGS)}
    decoder["stages"], decoder["evaluate"] = [{"train": train}], None
    facts = compress(parse(decoder), tmp_path / "out").facts
    assert facts["stages"][0]["coverage"]["share"] == 1.0
    assert facts["stages"][0]["facts"]["techniques"]["Pruning"]["sparsity"] == 0.5
    matrices = [
        v for k, v in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items() if "_proj" in k
    ]
    assert len(matrices) == 14
    assert all(((matrix.reshape(-1, 4) != 0).sum(1) == 2).all() for matrix in matrices)


def test_a_recipe_can_be_run_twice_and_names_its_teacher(decoder: dict[str, Any], tmp_path: Path) -> None:
    decoder["stages"], decoder["evaluate"] = decoder["stages"][1:2], None
    decoder["stages"][0]["train"]["prune"]["schedule"] = "oneshot"
    recipe = parse(decoder)
    for name in ("a", "b"):
        facts = compress(recipe, tmp_path / name).facts
        assert facts["stages"][0]["facts"]["techniques"]["Distillation"]["teacher"] == "dense"


def test_a_checkpoint_that_was_being_written_is_not_resumed(decoder: dict[str, Any], tmp_path: Path) -> None:
    whole, half = tmp_path / "checkpoint-9", tmp_path / "checkpoint-10"
    for folder in (whole, half):
        folder.mkdir()
    (whole / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(tmp_path) == str(whole)
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_a_streamed_source_is_never_loaded_nor_opened_where_it_does_not_fit(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr("hf_compress.stages.base.load_model", load)
    monkeypatch.setattr(pipeline, "load_model", load)
    monkeypatch.setattr(pipeline.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    packed = {"backend": "compressed-tensors", "bits": 4, "group_size": 32, "streaming": True}
    decoder["stages"] = [{"prune": {"sparsity": 0.5, "samples": 8, "streaming": True}}, {"quantize": packed}]
    said: list[str] = []
    facts = compress(parse(decoder), tmp_path / "out", say=said.append).facts
    assert facts["evaluation"] is None
    assert facts["verify"] is None
    assert any("neither measured nor opened" in line for line in said)
    assert "answers were not compared" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model(torch.arange(5)[None])
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() >= 0.5


def change(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    node: Any = recipe
    *keys, last = [int(k) if k.isdigit() else k for k in path.split("/")]
    for key in keys:
        node = node[key]
    node[last] = value
    return recipe


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("modle", {}, r"unknown section 'modle'[\s\S]*did you mean 'model'"),
        ("model/idd", "x", r"unknown key 'idd'[\s\S]*model.idd"),
        ("stages/0/prune/sparsty", 0.5, r"'sparsty'[\s\S]*stages\[0\].prune.sparsty[\s\S]*did you mean 'sparsity'"),
        ("stages/0/prune/criterion", "wnda", r"unknown criterion 'wnda'[\s\S]*did you mean 'wanda'"),
        ("stages/0/prune/pattern", "4:2", "unknown pattern"),
        ("stages/0/prune/sparsity", "half", r"stages\[0\].prune.sparsity[\s\S]*next: sparsity: share of each weight"),
        ("stages/1/train/args/max_stepz", 3, r"no field 'max_stepz'[\s\S]*did you mean 'max_steps'"),
        (
            "stages/1/train/distill/temprature",
            3,
            r"stages\[1\].train.distill.temprature[\s\S]*did you mean 'temperature'",
        ),
        ("stages/1/train/distill/loss", "forward_lk", r"unknown loss 'forward_lk'[\s\S]*did you mean 'forward_kl'"),
        ("stages/1/train/distill/temperature", 0, "is not positive"),
        ("stages/1/train/prune/schedule", "qubic", r"unknown schedule[\s\S]*did you mean 'cubic'"),
        ("stages/1/train/prune/criterion", "obs", r"training does not collect[\s\S]*stages\[1\].*prune.criterion"),
        ("stages/1/train/prune/begin", "2 weeks", r"no moment of a run[\s\S]*stages\[1\].*prune.begin"),
        ("stages/1/train/prune/sparsities", {"mlp": "much"}, r"stages\[1\].train.prune.sparsities"),
        ("stages/1/train/prune/sparsity", 1.0, r"not in \[0, 1\)"),
        ("stages/1/train/qat", {"bits": 9}, "not between 2 and 8"),
        ("stages/1/train/args/save_strategy", "sometimes", r"refuses these: 'sometimes'|sometimes[\s\S]*args"),
        ("stages/1/train/distill/teacher_model_init_kwargs", {"trust_remote_code": True}, "cannot be loaded with"),
        ("stages/1/train/distill/teacher_model_init_kwargs", {"use_safetensors": False}, "cannot be loaded with"),
        ("stages/1/train/args/hub_token", "hf_secret", "hub_token is not set here"),
        ("stages/1/train/prune/sparsity", 0.2, r"2:4 keeps 2 of 4, which is a sparsity of 0.5, not 0.2"),
        ("stages/0/prune/pattern", "1:4", "a sparsity of 0.75, not 0.5"),
        ("stages/0", {"export": {}}, "put export last"),
        ("stages", {"prune": {"sparsity": 0.9}}, "begins with a dash"),
        ("stages", [None], "begins with a dash"),
        ("stages/2/quantize/bits", 9, r"2 to 8 bits, not 9[\s\S]*stages\[2\].quantize.bits"),
        ("stages/1/train/args/max_steps", "abc", r"valid integer[\s\S]*args.max_steps[\s\S]*next: what Training"),
        ("stages/2/quantize/method", "gptqq", "no solver 'gptqq'"),
        ("stages/2/quantize/solver_options", {"damping": 1}, r"are those of a method[\s\S]*quantize.solver_options"),
        ("stages/0/prune/solver_options", {"stepz": 1}, r"did you mean 'steps'|has no option 'stepz'"),
        ("stages/2/quantize", {"backend": "bitsandbytes", "streaming": True}, "rounds the whole model at once"),
        ("stages/2/quantize/backend", "bitsandbites", r"unknown backend[\s\S]*did you mean 'bitsandbytes'"),
        ("stages/2/quantize/options", {"dtype": "float16"}, "no option 'dtype'"),
        (
            "stages/2/quantize",
            {"backend": "bitsandbytes", "options": {"double_quant": "much"}},
            r"valid boolean[\s\S]*options.double_quant[\s\S]*next: leave it out for False",
        ),
        ("stages/2", {"quantise": {}}, r"unknown stage 'quantise'[\s\S]*did you mean 'quantize'"),
        ("baseline", "finetune", "is no stage"),
        ("evaluate/metrics", ["qualty"], r"unknown metric[\s\S]*did you mean 'quality'"),
    ],
)
def test_mistakes_in_a_recipe_are_named_before_any_work(
    decoder: dict[str, Any], path: str, value: Any, says: str
) -> None:
    with pytest.raises(CompressError, match=says):
        parse(change(decoder, path, value))


def test_n_of_m_needs_no_quotes(tmp_path: Path, decoder: dict[str, Any]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(decoder).replace("'2:4'", "2:4"))
    recipe = load(str(file), ["stages.recover.prune.pattern=1:4", "stages.recover.prune.sparsity=.75"])
    assert recipe.stages[0].stage.pattern == "2:4"
    assert recipe.stages[1].stage.prune.pattern == "1:4"
    assert recipe.raw["stages"][1]["train"]["args"]["learning_rate"] == 1e-3


def test_yaml_words_reach_training_arguments(decoder: dict[str, Any], tmp_path: Path) -> None:
    text = yaml.safe_dump(decoder).replace("learning_rate: 0.001", "learning_rate: 1e-3\n      save_strategy: no")
    (tmp_path / "recipe.yaml").write_text(text)
    stage = load(str(tmp_path / "recipe.yaml")).stages[1].stage
    assert isinstance(stage, Train)
    assert stage.args["save_strategy"] == "no"
    assert stage.args["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("data/text_column", "txt", r"no column 'txt'[\s\S]*text, label, source"),
        ("data/filter", {"source": "nowhere"}, "no row is left"),
        ("data/split", "tests", r"no split 'tests'"),
        ("data/id", "nowhere.csv", "there is no file nowhere.csv"),
        ("model/id", "package://no_such_package/model", "is not installed"),
        ("model/id", "/no/such/folder", "no such folder"),
        ("stages/2/quantize/group_size", 48, r"group sizes? [\s\S]*: 64, 32, 16"),
        ("stages/0/prune/pattern", "24:48", r"does not divide 64[\s\S]*model.layers.0"),
    ],
)
def test_mistakes_that_need_the_data_leave_nothing(
    decoder: dict[str, Any], tmp_path: Path, path: str, value: Any, says: str
) -> None:
    with pytest.raises(CompressError, match=says):
        compress(parse(change(decoder, path, value)), tmp_path / "made" / "out")
    assert not (tmp_path / "made").exists()


def test_teacher_with_another_tokenizer_is_refused(decoder: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher", WORDS[:3] + WORDS[3:][::-1])
    decoder["stages"] = [
        change(decoder, "stages/1/train/distill/teacher_model", str(tmp_path / "teacher"))["stages"][1]
    ]
    decoder["stages"][0]["train"]["prune"]["schedule"] = "oneshot"
    with pytest.raises(CompressError, match="different tokenizers"):
        compress(parse(decoder), tmp_path / "out")


def test_pickle_only_checkpoints_are_refused(decoder: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CompressError, match=r"only pickle files: pytorch_model.bin"):
        compress(parse(decoder), tmp_path / "out")


def test_a_missing_extra_is_named_with_its_pip_command(
    classifier: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    with pytest.raises(CompressError, match=r"pip install 'hf-compress\[onnx\]'"):
        parse(classifier)


def test_a_full_disk_leaves_nothing_under_the_final_name(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "write_card", full)
    with pytest.raises(OSError, match="No space"):
        compress(parse(decoder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_save_that_changes_the_model_is_caught(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def careless(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors["model.norm.weight"] *= 1.1
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})

    decoder["stages"], decoder["evaluate"] = decoder["stages"][:1], None
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", careless)
    with pytest.raises(CompressError, match="logits differ"):
        compress(parse(decoder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overrides_reach_stages_by_name_kind_and_number(tmp_path: Path, classifier: dict[str, Any]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(classifier))
    recipe = load(
        str(file),
        ["stages.distil.args.max_steps=9", "stages.shrink.ffn=32", "stages.0.args.learning_rate=2e-5", "seed=7"],
    )
    train, shrink = recipe.stages[2].stage, recipe.stages[1].stage
    assert (train.args["max_steps"], shrink.ffn, recipe.stages[0].stage.args["learning_rate"], recipe.seed) == (
        9,
        32,
        2e-5,
        7,
    )
    with pytest.raises(CompressError, match=r"no stage 'destil'[\s\S]*did you mean 'distil'"):
        load(str(file), ["stages.destil.args.max_steps=9"])


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_parse_and_say_what_they_are(name: str) -> None:
    assert load(name).stages
    assert shipped()[name].read_text().startswith("# ")


def test_plan_of_the_quickstart_shape_matches_what_is_written(classifier: dict[str, Any], tmp_path: Path) -> None:
    planned = plan(parse(classifier))[-1]
    facts = compress(parse(classifier), tmp_path / "out").facts["evaluation"]["artefacts"]["root"]
    assert planned.parameters == facts["parameters"]
    assert planned.bytes == pytest.approx(facts["bytes"], rel=0.1)


def test_every_number_of_the_card_comes_from_the_facts(decoder: dict[str, Any], tmp_path: Path) -> None:
    folder = compress(parse(decoder), tmp_path / "out").folder
    facts = json.loads((folder / "hf_compress.json").read_text())
    card = render_card(facts)
    for path in (
        "root/perplexity/value",
        "root/kl_to_dense",
        "root/bytes",
        "dense/parameters",
        "root/perplexity_difference/low",
    ):
        other = json.loads(json.dumps(facts))
        change(other["evaluation"]["artefacts"], path, 123456789.0)
        assert render_card(other) != card, path
    template = (Path(pipeline.__file__).parent / "card" / "template.md").read_text()
    assert not re.findall(r"\d", re.sub(r"\{%.*?%\}|\{:\.\d[%e]\}", "", template))


def test_cards_do_not_say_where_things_lay(decoder: dict[str, Any], tmp_path: Path) -> None:
    decoder["stages"], decoder["evaluate"] = decoder["stages"][:1], {"metrics": ["quality"]}
    facts = compress(parse(decoder), tmp_path / "out", command=f"hf-compress run x --output {tmp_path}/out").facts
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path.parent) in json.dumps(facts)
    assert str(tmp_path.parent) not in card
    assert "--output out" in card
    assert "reviews.csv" in card
    kept = {"a": ["package://p/data/x.csv", "org/name", "a/b of c/d", "1 / 2", "x://h//p"], "b": 1}
    assert without_folders(kept) == kept
    told = ["../models/x", "~/m", "./a/b", "--out=/x", "/home/me/.cache/x"]
    assert without_folders(told) == ["x", "m", "b", "--out=x", "x"]


def test_hostile_names_stay_text(decoder: dict[str, Any], tmp_path: Path) -> None:
    facts = compress(parse(decoder | {"name": 'x"><script>|\n---\nlicense: mit'}), tmp_path / "out").facts
    card = render_card(facts)
    body = card.split("---\n", 2)[2].split("## How to reproduce")[0]
    assert "<script>" not in body
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


def test_ctrl_c_in_training_saves_and_the_same_command_goes_on(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder["evaluate"] = None
    whole = compress(parse(decoder), tmp_path / "whole").folder
    terms, steps = Distillation.loss_terms, []

    def interrupted(self: Distillation, step: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return terms(self, step)

    monkeypatch.setattr(Distillation, "loss_terms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(parse(decoder), tmp_path / "again")
    assert len(steps) == 2
    assert list((tmp_path / ".again.work").glob("*recover*.running/trainer/checkpoint-2"))
    again = compress(parse(decoder), tmp_path / "again").folder
    assert len(steps) == 4  # two before the interruption, two after: nothing was done twice
    ours, theirs = load_file(again / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_is_alone_in_its_work_folder(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.work").mkdir()
    recipe = parse(decoder)
    assert not (tmp_path / "out").exists()
    with FileLock(tmp_path / ".out.work" / "lock"), pytest.raises(CompressError, match="another run is at work"):
        compress(recipe, tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CompressError, match="this is one of 2"):
        compress(recipe, tmp_path / "out")


def test_a_stage_whose_files_changed_is_done_again(
    decoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("deepseek_v3", seed=1).save_pretrained(tmp_path / "teacher")
    decoder["stages"][1]["train"]["distill"]["teacher_model"] = str(tmp_path / "teacher")
    recipe = parse(decoder)

    def folders() -> list[str]:
        return [Finished.stage(tmp_path, recipe, index).folder.name for index in (-1, 0, 1)]

    before = folders()
    assert folders() == before
    for harmless in (tmp_path / "teacher" / ".out.work", tmp_path / "dense"):
        harmless.mkdir()
        (harmless / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert folders() == before
    with (tmp_path / "teacher" / "config.json").open("a") as file:
        file.write("\n")
    taught = folders()
    assert [a == b for a, b in zip(before, taught, strict=True)] == [True, True, False]
    with (tmp_path / "reviews.csv").open("a") as file:
        file.write("very good film,1,a\n")
    assert [a == b for a, b in zip(taught, folders(), strict=True)] == [True, False, False]


def test_training_in_a_thread_leaves_signals_alone() -> None:
    before, said = signal.getsignal(signal.SIGINT), []

    def inside() -> bool:
        with StopAfterSaving(said.append):
            return signal.getsignal(signal.SIGINT) is before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result()
    with StopAfterSaving(said.append) as _:
        assert signal.getsignal(signal.SIGINT) is not before
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again stops at once" in said[0]


@pytest.mark.parametrize("packed", [False, True])
def test_names_and_shapes_of_what_is_too_large_to_open(packed: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if packed:
        quantize(tiny("deepseek_v3"), out, backend="compressed-tensors", bits=4, group_size=32)
    else:
        tiny("deepseek_v3").save_pretrained(out)
    verify_names(out)
    file = out / "model.safetensors"
    whole = load_file(file)
    name = next(key for key in whole if key.endswith("experts.1.up_proj.weight" + "_packed" * packed))
    for wrong in (
        {key: value for key, value in whole.items() if key != name},
        whole | {name: whole[name][:8].clone()},
        whole | {"model.layers.0.self_attn.q_projj.weight": torch.ones(2)},
    ):
        save_file(wrong, file, {"format": "pt"})
        with pytest.raises(CompressError, match="does not reload"):
            verify_names(out)


def test_which_experts_run_one_by_one_is_the_familys_word(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    write_expectation(model, tmp_path)
    assert bool(load_file(tmp_path / "verify" / "expectation.safetensors")["eager_experts"])
    write_expectation(tiny("llama"), tmp_path)
    assert "eager_experts" not in load_file(tmp_path / "verify" / "expectation.safetensors")
    renamed = AutoConfig.for_model("deepseek_v3")
    renamed.num_experts_per_tok = None  # another family may call it otherwise
    assert expert_options(renamed) == ({} if torch.cuda.is_available() else {"experts_implementation": "eager"})
    assert expert_options(AutoConfig.for_model("llama")) == {}


def test_only_what_a_run_made_is_overwritten(decoder: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(CompressError, match="nothing here was made by a run"):
        compress(parse(decoder), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"
    (tmp_path / "file").write_text("years")
    with pytest.raises(CompressError, match="nothing here was made by a run"):
        compress(parse(decoder), tmp_path / "file", overwrite=True)


def test_seconds_of_interrupted_runs_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 100.0, 102.0])
    monkeypatch.setattr("hf_compress.finished.time", SimpleNamespace(time=lambda: next(clock)))
    stage = Finished(tmp_path / "stage")
    with pytest.raises(KeyboardInterrupt), stage.timed():
        raise KeyboardInterrupt
    with Finished(tmp_path / "stage").timed():
        pass
    assert stage.seconds == 7.0


def test_a_head_that_the_source_does_not_hold_is_named(classifier: dict[str, Any], tmp_path: Path) -> None:
    """And a file of data that is not here, by the plan."""
    base = tiny("bert", num_hidden_layers=3).bert
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    classifier["model"] = {"id": str(tmp_path / "base"), "task": "text-classification", "num_labels": 2}
    classifier |= {"stages": [{"shrink": {"ffn": 64}}], "evaluate": None}
    classifier.pop("baseline")
    said: list[str] = []
    facts = compress(parse(classifier), tmp_path / "out", say=said.append).facts
    assert facts["new_weights"] == ["classifier.bias", "classifier.weight"]
    assert any("drawn at random: classifier.bias, classifier.weight" in line for line in said)
    assert "classifier.weight: not in the source" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "reviews.csv").unlink()
    notes = plan(parse(classifier))[0].notes
    assert notes == [f"will be REFUSED: data: there is no file {tmp_path / 'reviews.csv'}; next: check the path"]
    with pytest.raises(CompressError, match=r"there is no file[\s\S]*next: check the path\. `hf-compress plan`"):
        require_possible(parse(classifier))
