"""Contract 4: n micro-batches of 1 train as 1 of n does; the order of techniques changes nothing; 1 rank and 2
agree."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BertForTokenClassification

from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from tests.models import tiny
from tests.ranks import on_two_ranks
from tests.training import collate, rows, trainer

EVERY_FEATURE = dict.fromkeys(
    ("hidden_mse", "squarehead", "hidden_cosine", "relations", "rkd_distance", "rkd_angle", "gram", "cka"), 0.1
)


def models(name: str) -> tuple[Any, Any]:
    """Student and teacher of a kind of head, without dropout; where one can, the teacher is wider."""
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "t5":
        shape = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        shape |= {"pad_token_id": 0, "decoder_start_token_id": 0, "dropout_rate": 0.0}
        made = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            made.append(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **shape)))
        return made[0], made[1]
    if name == "tokens":
        made, config = [], tiny("bert", **calm, num_labels=128).config
        for seed in (0, 1):
            torch.manual_seed(seed)
            made.append(BertForTokenClassification(config))
        return made[0], made[1]
    changes = {"regression": {"num_labels": 1}, "multilabel": {"num_labels": 3}, "bert": {}}.get(name)
    if changes is not None:
        if name == "multilabel":
            changes |= {"problem_type": "multi_label_classification"}
        return tiny("bert", **calm, **changes), tiny("bert", seed=1, **calm, **changes)
    return tiny(name), tiny(name, seed=1, hidden_size=128)


def labelled(name: str, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Labels as that kind of head takes them."""
    made = collate(batch)
    if name == "regression":
        made["labels"] = made["input_ids"][:, :1].float() / 64
    elif name == "multilabel":
        made["labels"] = (made["input_ids"][:, :3] % 2).float()
    return made


def weights_after(name: str, folder: Path, order: int = 1, distil: Any = None, **args: Any) -> dict[str, torch.Tensor]:
    student, teacher = models(name)
    options = {"features": {"hidden_mse": 0.5}} if distil is None else distil
    techniques: list[Any] = [Distillation(teacher, **options)]
    if name not in ("t5", "tokens", "regression", "multilabel"):
        techniques.append(Pruning(0.5, schedule="linear", every=1))
    classes = name in ("bert", "regression", "multilabel")
    run = trainer(
        student,
        folder,
        techniques[::order],
        optim="sgd",
        max_grad_norm=0,
        max_steps=2,
        train_sampling_strategy="sequential",
        **args,
    )
    run.train_dataset = rows(classes=classes)
    run.data_collator = partial(labelled, name)
    run.train()
    logged = [entry["loss_distill"] for entry in run.state.log_history if "loss_distill" in entry]
    assert logged
    assert all(math.isfinite(value) and value > 0 for value in logged)
    return {k: v.clone() for k, v in run.model.state_dict().items()}


CHUNKED = {"chunked": True, "chunk_size": 5, "features": EVERY_FEATURE}
CASES = {
    "llama": ("llama", None),
    "bert": ("bert", None),
    "chunked": ("llama", {"chunked": True, "chunk_size": 5}),
    "features": ("llama", {"features": EVERY_FEATURE}),
    "router": ("qwen3_moe", {"features": {"router_kl": 1.0, "expert_usage": 1.0}}),
    "t5": ("t5", {}),
    "t5-chunked": ("t5", {"chunked": True}),
    "tokens": ("tokens", {}),
    "regression": ("regression", {"loss": "mse"}),
    "multilabel": ("multilabel", {"loss": "jsd"}),
}


@pytest.mark.parametrize("case", CASES)
def test_accumulation_equals_one_batch(case: str, tmp_path: Path) -> None:
    name, distil = CASES[case]
    one = weights_after(name, tmp_path, distil=distil, per_device_train_batch_size=4)
    four = weights_after(name, tmp_path, distil=distil, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(four, one, atol=2e-5, rtol=1e-3)


def test_order_of_techniques_changes_nothing(tmp_path: Path) -> None:
    first, second = (weights_after("llama", tmp_path, order) for order in (1, -1))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("name", "distil"), [("llama", None), ("llama", CHUNKED)], ids=["whole", "chunked"])
def test_two_ranks_equal_one(name: str, distil: Any, tmp_path: Path) -> None:
    """Whole logits, and chunked: the loss is made inside the wrapped forward, so DDP sees the head at work."""
    one = weights_after(name, tmp_path, distil=distil, per_device_train_batch_size=4)
    call = f"weights_after({name!r}, folder, distil={distil!r}, per_device_train_batch_size=2)"
    first, _ = on_two_ranks(__name__, call, tmp_path)
    torch.testing.assert_close(first, one, atol=2e-5, rtol=1e-3)


def evaluated(folder: Path, batch: int) -> dict[str, float]:
    technique = Distillation(tiny("llama", seed=1), temperature=1.0, features={"hidden_mse": 1.0})
    run = trainer(tiny("llama"), folder, [technique], per_device_eval_batch_size=batch)
    run.evaluate()
    return {k: v for k, v in run.state.log_history[-1].items() if k in ("eval_distill", "eval_kl", "eval_hidden_mse")}


def test_terms_at_evaluation_are_means_over_all_items(tmp_path: Path) -> None:
    """Rows of 5 to 14 tokens, in whole and uneven batches, and on two ranks: at a temperature and weight of 1 the
    term is the KL."""
    whole = evaluated(tmp_path, 16)
    assert whole["eval_distill"] == pytest.approx(whole["eval_kl"], rel=1e-5)
    for found in (evaluated(tmp_path, 5), *on_two_ranks(__name__, "evaluated(folder, 2)", tmp_path)):
        assert found == pytest.approx(whole, rel=1e-5)


def test_balance_of_experts_counts_once_however_a_batch_is_split(tmp_path: Path) -> None:
    """Each micro-batch has a mean of its own: these must not add up, and chunked losses must not lose them."""
    found = []
    for chunked, accumulated in ((False, 1), (False, 4), (True, 1), (True, 4)):
        student = tiny("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0)
        run = trainer(
            student,
            tmp_path,
            [Distillation(tiny("qwen3_moe", seed=1), chunked=chunked)],
            max_steps=1,
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
        )
        run.train()
        found.append({k: v for k, v in run.state.log_history[0].items() if k in ("loss_task", "loss_balance")})
        task = run.evaluate()["eval_loss"]
        student.config.output_router_logits = False
        assert run.evaluate()["eval_loss"] == pytest.approx(task)
    one, four, *chunked_ones = found
    assert four["loss_task"] == pytest.approx(one["loss_task"], rel=1e-4)
    assert four["loss_balance"] == pytest.approx(one["loss_balance"], rel=0.3)  # not 4 x
    assert chunked_ones == [pytest.approx(one, rel=1e-4), pytest.approx(four, rel=1e-4)]


def test_examples_without_a_label_are_learned_from_the_teacher_alone(tmp_path: Path) -> None:
    """In micro-batches that hold some labels, one, or none."""

    def unlabelled(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = collate(batch)
        made["labels"] = torch.where(made["input_ids"][:, 0] % 2 == 0, made["labels"], -100)
        return made

    found = []
    for accumulated in (1, 4):
        run = trainer(
            *(models("bert")[0], tmp_path, [Distillation(models("bert")[1])]),
            max_steps=2,
            optim="sgd",
            max_grad_norm=0,
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
        )
        run.data_collator = unlabelled
        run.train()
        found.append({k: v.clone() for k, v in run.model.state_dict().items()})
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-3)


def test_terms_are_logged_under_their_names(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1))], task_weight=0.5)
    run.train()
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["loss_task"] + entry["loss_distill"], abs=1e-3)
    evaluation = run.evaluate()
    assert {"eval_loss", "eval_kl"} <= set(json.loads(json.dumps(run.state.log_history[-1])))
    assert evaluation["eval_loss"] > 0
