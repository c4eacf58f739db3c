"""What Distillation adds to the loss, its teachers' checks, and scripts that use the dataclasses."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import BertForMaskedLM, DataCollatorWithFlattening, HfArgumentParser, TrainingArguments

from hf_compress.errors import CompressError
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.trainers import DistillationTrainer
from tests.contracts.test_loss_scale import labelled, models
from tests.models import tiny
from tests.training import collate, rows, trainer


def by_hand(kind: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """(rows,) at T = 2, times 4, mean over labels."""
    if kind == "regression":
        return (ours - theirs).square().mean(-1)
    if kind == "multilabel":
        q, p = (ours / 2).sigmoid(), (theirs / 2).sigmoid()
        return 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)
    q, p = (ours / 2).softmax(-1), (theirs / 2).softmax(-1)
    return 4 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("kind", ["bert", "regression", "multilabel", "tokens", "llama", "t5"])
def test_each_head_is_distilled_where_and_as_it_predicts(kind: str, tmp_path: Path) -> None:
    student, teacher = models(kind)
    loss = "mse" if kind == "regression" else "forward_kl"
    run = trainer(student, tmp_path, [Distillation(teacher, loss=loss)])
    batch = labelled(kind, [rows(classes=kind in ("bert", "regression", "multilabel"))[i] for i in range(4)])
    student.eval()
    teacher.eval()
    with torch.no_grad():
        run.compute_loss(run.model, dict(batch))
        ours, theirs = (model(**batch).logits for model in (student, teacher))
    chosen: torch.Tensor = torch.ones(len(ours), dtype=torch.bool)
    if kind in ("tokens", "t5"):
        chosen = batch["labels"] != -100
    elif kind == "llama":
        chosen = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    expected = by_hand(kind, ours[chosen], theirs[chosen]).mean()
    total, items = run._eval_logged["distill"][0]
    torch.testing.assert_close(total / items, expected, rtol=1e-4, atol=1e-5)


def test_each_evaluated_dataset_has_its_own_measures(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1))])
    first, others = run.eval_dataset.select(range(4)), run.eval_dataset.select(range(4, 16))
    alone = run.evaluate(first)
    run.predict(others)  # logs nothing, and must leave nothing behind
    assert run.evaluate(first)["eval_kl"] == alone["eval_kl"]
    both = run.evaluate({"a": first, "b": others})
    for name in ("kl", "agreement", "distill"):
        assert both[f"eval_a_{name}"] == alone[f"eval_{name}"]
        assert f"eval_b_{name}" in both
    assert both["eval_b_kl"] != both["eval_a_kl"]


@pytest.mark.parametrize("chunked", [False, True])
def test_kl_and_agreement_at_evaluation_are_means_over_all_positions(chunked: bool, tmp_path: Path) -> None:
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    teacher.lm_head.weight.data = 0.7 * student.lm_head.weight.data + 0.3 * teacher.lm_head.weight.data
    teacher.model.load_state_dict(student.model.state_dict())
    run = trainer(student, tmp_path, [Distillation(teacher, chunked=chunked)], per_device_eval_batch_size=5)
    run.evaluate()
    kl, same = [], []
    for row in run.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    logged = run.state.log_history[-1]
    assert logged["eval_kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert logged["eval_agreement"] == pytest.approx(float(torch.cat(same).float().mean()), rel=1e-4)
    assert 0.2 < logged["eval_agreement"] < 1


def test_padding_changes_nothing(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1), features={"hidden_mse": 1.0})])
    batch = collate([rows()[0]])
    longer = {k: torch.nn.functional.pad(v, (0, 6), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    run.model.eval()
    terms = []
    for inputs in (batch, longer):
        run._eval_logged.clear()
        run.compute_loss(run.model, inputs)
        terms.append({k: v[0] for k, v in run._eval_logged.items()})
    torch.testing.assert_close(terms[0], terms[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunked", [False, True])
def test_packed_texts_are_learned_as_rows_of_their_own(chunked: bool, tmp_path: Path) -> None:
    """Texts one after another in a row, told apart by position_ids alone: no model looks from one into another."""
    found = []
    for collator in (collate, DataCollatorWithFlattening()):
        run = trainer(
            tiny("llama"),
            tmp_path,
            [Distillation(tiny("llama", seed=1), chunked=chunked)],
            max_steps=1,
            train_sampling_strategy="sequential",
        )
        run.data_collator = collator
        run.train()
        run.evaluate()
        first, last = run.state.log_history[0], run.state.log_history[-1]
        found.append([first["loss_task"], first["loss_distill"], first["grad_norm"], last["eval_kl"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_numbers_as_labels_of_a_student_that_its_config_calls_a_classifier_are_refused(tmp_path: Path) -> None:
    """transformers takes the kind of loss from such labels, and each label would be distilled as a class of one."""
    run = trainer(tiny("bert", num_labels=3), tmp_path, [Distillation(tiny("bert", seed=1, num_labels=3))])
    run.data_collator = partial(labelled, "multilabel")
    with pytest.raises(CompressError, match="problem_type"):
        run.train()


def test_a_loss_function_that_would_not_be_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="compute_loss_func"):
        DistillationTrainer(
            tiny("llama"),
            tiny("llama", seed=1),
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            compute_loss_func=lambda *_, **__: None,
        )


def test_one_process_with_several_gpus_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(CompressError, match=r"to 2 GPUs[\s\S]*torchrun --nproc_per_node 2"):
        DistillationTrainer(tiny("llama"), tiny("llama", seed=1), args=args)


def test_facts_hold_every_option_that_changes_what_is_learned(tmp_path: Path) -> None:
    technique = Distillation(tiny("llama", seed=1), loss="jsd", beta=0.3)
    trainer(tiny("llama"), tmp_path, [technique])
    facts = json.loads(json.dumps(technique.facts()))
    assert (facts["teacher"], facts["loss"], facts["beta"]) == ("LlamaForCausalLM", "jsd", 0.3)
    told = {f.name for f in dataclasses.fields(Distillation)} - {
        "teacher_model",
        "teacher_model_init_kwargs",
        "teachers",
    }
    assert told <= facts.keys()


def test_predictions_hold_logits_only(tmp_path: Path) -> None:
    run = trainer(tiny("bert"), tmp_path, [Distillation(tiny("bert", seed=1), features={"hidden_mse": 1.0})])
    assert run.predict(run.eval_dataset).predictions.shape == (16, 2)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ({"vocab_size": 64}, {}, "vocabulary"),
        ({}, {"layer_map": [0, 7], "features": {"hidden_mse": 1.0}}, "layer_map"),
        ({}, {"loss": "forward_lk"}, "forward_kl"),
    ],
)
def test_bad_teachers_are_refused_before_training(teacher: dict, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=message):
        trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", **teacher), **options)])


@pytest.mark.parametrize("chunked", [False, True])
def test_teacher_with_nan_is_named(chunked: bool, tmp_path: Path) -> None:
    teacher = tiny("llama")
    teacher.lm_head.weight.data[0] = torch.nan
    with pytest.raises(CompressError, match="teacher's logits"):
        trainer(tiny("llama"), tmp_path, [Distillation(teacher, chunked=chunked)]).train()


def test_one_technique_of_a_kind_one_run_a_trainer_and_known_heads(tmp_path: Path) -> None:
    teacher = tiny("llama", seed=1)
    with pytest.raises(CompressError, match="two techniques of one kind"):
        trainer(tiny("llama"), tmp_path, [Distillation(teacher), Distillation(teacher)])
    with pytest.raises(CompressError, match="BertForMaskedLM"):
        trainer(BertForMaskedLM(tiny("bert").config), tmp_path, [])
    run = trainer(tiny("llama"), tmp_path, [Distillation(teacher)])
    run.train()
    with pytest.raises(CompressError, match="has finished"):
        run.train()


def test_batches_without_labels_are_explained(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1))])
    run.data_collator = lambda batch: {k: v for k, v in collate(batch).items() if k != "labels"}
    with pytest.raises(CompressError, match="DataCollatorForLanguageModeling"):
        run.train()


def test_projections_serve_a_student_in_bfloat16(tmp_path: Path) -> None:
    student, teacher = tiny("llama").to(torch.bfloat16), tiny("llama", hidden_size=128)
    run = trainer(student, tmp_path, [Distillation(teacher, features={"hidden_mse": 1.0})])
    run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_lora_student_learns_from_its_own_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", r=4))
    run = trainer(student, tmp_path, [Distillation("base")], task_weight=0.0)
    run.train()
    other = DistillationTrainer(
        tiny("llama"),
        "base",
        chunked=True,
        peft_config=LoraConfig(target_modules=["q_proj"], r=4),
        args=TrainingArguments(str(tmp_path), use_cpu=True, dataloader_pin_memory=False, max_steps=1),
        train_dataset=rows(),
        data_collator=collate,
    )
    trained = {name.split(".")[-3] for name, p in other.model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    other.train()
    assert other.techniques[0].chunked
    assert run.state.log_history[0]["loss_distill"] == pytest.approx(
        0, abs=1e-5
    )  # B = 0 at the start: the student is its base


@pytest.fixture
def _annotations() -> Iterator[None]:
    """HfArgumentParser writes into the dataclasses: of ``float | str`` it leaves float, for the whole process."""
    before = [(f, f.type) for kind in (TrainingArguments, Distillation, Pruning) for f in dataclasses.fields(kind)]
    yield
    for one, kind in before:
        one.type = kind


@pytest.mark.usefixtures("_annotations")
def test_thin_trainer_and_argument_parser(tmp_path: Path) -> None:
    args, distillation, pruning = HfArgumentParser(
        (TrainingArguments, Distillation, Pruning)
    ).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--temperature",
            "4",
            "--sparsity",
            "0.3",
            "--use_cpu",
            "--max_steps",
            "1",
            "--report_to",
            "none",
        ]
    )
    assert (distillation.temperature, pruning.sparsity) == (4.0, 0.3)
    DistillationTrainer(
        tiny("llama"),
        tiny("llama", seed=1),
        temperature=distillation.temperature,
        args=args,
        train_dataset=rows(),
        data_collator=collate,
    ).train()


def test_a_mapping_is_validated_into_a_technique() -> None:
    assert TypeAdapter(Distillation).validate_python({"teacher_model": "dense", "layer_map": [0, 1]}).layer_map == [
        0,
        1,
    ]
    with pytest.raises(ValidationError, match="temprature"):
        TypeAdapter(Distillation).validate_python({"temprature": 2})
