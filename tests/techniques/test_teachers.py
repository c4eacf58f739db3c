"""Several teachers, packed teachers, teachers of other heads and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForTokenClassification, PreTrainedTokenizerFast

from hf_compress.errors import CompressError
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.soft_targets import Online, SoftTargets
from hf_compress.weights import blocks_of
from tests.models import tiny
from tests.training import save_tokenizer, trainer


def saved(folder: Path, name: str = "llama", seed: int = 1, **changes: int) -> str:
    tiny(name, seed=seed, **changes).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("given", ["model", "folder", "base"])
def test_teachers_answer_without_dropout_and_gradients(given: str, tmp_path: Path) -> None:
    """Also a model that was in train mode, and the student's own base, which goes back to train mode afterwards."""
    student = tiny("llama")
    teacher: Any = {"model": tiny("llama", seed=1).train(), "folder": saved(tmp_path / "a"), "base": "base"}[given]
    if given == "base":
        student = get_peft_model(student, LoraConfig(target_modules="all-linear", r=4))
    technique = Distillation(teacher)
    run = trainer(student, tmp_path, [technique], max_steps=2)
    seen: list[tuple[bool, bool]] = []
    blocks_of(technique._teachers[0])[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
    )
    run.train()
    assert seen == ([(False, False), (True, True)] if given == "base" else [(False, False)]) * 2


def test_a_teacher_may_lie_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "some_teachers" / "small")
    monkeypatch.syspath_prepend(tmp_path)
    technique = Distillation("package://some_teachers/small")
    trainer(tiny("llama"), tmp_path, [technique])
    assert torch.equal(technique._teachers[0].lm_head.weight, tiny("llama", seed=1).lm_head.weight)


def test_the_student_is_not_its_own_teacher(tmp_path: Path) -> None:
    student = tiny("llama")
    with pytest.raises(CompressError, match="the student itself"):
        trainer(student, tmp_path, [Distillation(student)])


@pytest.mark.parametrize(
    ("task_weight", "options", "what"),
    [
        (0.0, {"weight": 0.0}, "nothing to learn"),
        (-1.0, {}, "task_weight -1.0 is negative"),
        (float("nan"), {}, "task_weight nan is negative"),
    ],
)
def test_a_loss_of_nothing_or_away_from_the_task_is_refused(
    task_weight: float, options: dict[str, float], what: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=what):
        trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1), **options)], task_weight=task_weight)


@pytest.mark.parametrize("chunked", [False, True])
def test_several_teachers_are_a_weighted_mean(chunked: bool, tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)

    def first(**options: object) -> float:
        run = trainer(tiny("llama"), tmp_path, [Distillation(chunked=chunked, **options)], max_steps=1)
        run.train()
        return float(run.state.log_history[0]["loss_distill"])

    each = [first(teacher_model=name) for name in (a, b)]
    assert first(teachers=[a, b], teacher_weights=[3.0, 1.0]) == pytest.approx(
        0.75 * each[0] + 0.25 * each[1], rel=1e-3
    )
    assert first(teachers=[a, b]) == pytest.approx(sum(each) / 2, rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_packed_teachers_answer_nearly_as_whole_ones(name: str, bits: int, tmp_path: Path) -> None:
    """DeepSeek: kv_b_proj stays whole in 8 bits, which bitsandbytes could not run."""
    folder = saved(tmp_path / "teacher", name, initializer_range=0.05)
    found = []
    for one in (None, bits):
        technique = Distillation(folder, teacher_bits=one, chunked=True)
        run = trainer(tiny(name, initializer_range=0.05), tmp_path, [technique], max_steps=1)
        packed = {type(m).__name__ for m in technique._teachers[0].modules()} & {"Linear8bitLt", "Linear4bit"}
        assert bool(packed) == bool(one)
        assert type(technique._teachers[0].lm_head) is torch.nn.Linear
        found.append(run.evaluate()["eval_loss"])
        found.append(run.state.log_history[-1]["eval_kl"])
    assert found[2] == pytest.approx(found[0])  # the task loss has nothing to do with the teacher
    assert found[3] == pytest.approx(found[1], rel=0.3)
    assert found[3] != found[1]


def test_teachers_of_other_heads_labels_and_tokens_are_refused(tmp_path: Path) -> None:
    cases = [
        (tiny("bert"), BertForTokenClassification(tiny("bert").config), "do not mean the same"),
        (tiny("bert", num_labels=3), tiny("bert"), "2 labels"),
        (tiny("bert", num_labels=1), tiny("bert"), "do not mean the same"),
        (tiny("bert", num_labels=1), tiny("bert", num_labels=1), "loss: mse"),
    ]
    for student, teacher, message in cases:
        with pytest.raises(CompressError, match=message):
            trainer(student, tmp_path, [Distillation(teacher)])


def test_a_teacher_without_the_weights_of_its_head_is_refused(tmp_path: Path) -> None:
    """transformers makes them at random with a warning, and the student would learn noise."""
    body = tiny("bert").bert
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(CompressError, match=r"lacks weights of a BertForSequenceClassification: classifier\.bias"):
        trainer(tiny("bert"), tmp_path, [Distillation(str(tmp_path / "body"))])


def test_a_teacher_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny("llama").config.save_pretrained(tmp_path / "config")
    tiny("bert").config.save_pretrained(tmp_path / "bert")
    for name in ("empty", "config", "bert"):
        with pytest.raises(
            CompressError, match=f"cannot read the teacher: [^\n]*\n  where: .*{name}'\n  next: a folder"
        ):
            trainer(tiny("llama"), tmp_path, [Distillation(str(tmp_path / name))])


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher", ["[PAD]", "[UNK]", "[EOS]", "other", "words"])
    run = trainer(tiny("llama"), tmp_path, [])
    mine = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path / "mine"))
    run.processing_class = mine
    technique = Distillation(teacher)
    technique.attach(run.model)
    with pytest.raises(CompressError, match="different tokenizers"):
        technique.prepare(run)


@pytest.mark.parametrize("sizes", [(20, 24), (24, 20)], ids=["teacher wider", "student wider"])
def test_of_padded_vocabularies_the_common_classes_are_compared(sizes: tuple[int, int]) -> None:
    student, teacher = (torch.randn(5, size, requires_grad=True) for size in sizes)
    q, p = (x[:, :20].log_softmax(-1) for x in (student, teacher))
    expected = (p.exp() * (p - q)).sum(-1)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    online = Online(lambda part: teacher.detach()[part])
    online.chunk(torch.arange(5))
    online.block(slice(None))
    value, gradient = online.learn(student.detach().clone(), SoftTargets("forward_kl"))
    torch.testing.assert_close((value, gradient), (expected, wanted), atol=1e-6, rtol=1e-5)
    kl, _ = online.compare(student.detach().log_softmax(-1))
    torch.testing.assert_close(kl, expected, atol=1e-6, rtol=1e-5)


def test_padded_vocabularies_share_what_both_have(tmp_path: Path) -> None:
    mine = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    values = []
    for chunked in (False, True):
        teacher = tiny("llama", seed=1, vocab_size=160)
        technique = Distillation(teacher, chunked=chunked)
        run = trainer(tiny("llama"), tmp_path, [])
        run.processing_class = mine
        run.techniques, run._chunked = [technique], chunked
        technique.attach(run.model)
        technique.prepare(run)
        run.evaluate()
        values.append(run.state.log_history[-1]["eval_distill"])
    assert values[0] > 0
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a teacher"),
        ({"teacher_model": "a", "teachers": ["b"]}, "both given"),
        ({"teachers": ["a", "b"], "teacher_weights": [1.0]}, "teacher_weights"),
        ({"teacher_model": "a", "teacher_bits": 3}, "teacher_bits"),
        ({"teacher_model": "a", "chunk_size": 0}, "chunk_size"),
        ({"teacher_model": "a", "loss": "jsd", "beta": 2.0}, "beta"),
        ({"teacher_model": "a", "loss": "skew_kl", "alpha": 1.0}, "alpha"),
        ({"teacher_model": "a", "loss": "hidden_mse"}, "features"),
        ({"teacher_model": "a", "teacher_model_init_kwargs": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"teacher_model": "base"}, "no adapters"),
        ({"teacher_model": "base", "teacher_bits": 8}, "not for a cache, a loaded model or `base`"),
        ({"teacher_model": "/no/such/folder"}, "no such folder"),
        ({"teacher_model": Path("a")}, "distill.teacher_model"),
        ({"teachers": "a"}, "valid list"),
        ({"teacher_model": "a", "temperature": "2"}, "distill.temperature"),
        ({"teacher_model": "a", "loss": None}, "distill.loss"),
        ({"teacher_model": "a", "weight": -1.0}, "weight -1.0 is negative"),
        ({"teacher_model": "a", "weight_end": -1.0}, "weight_end -1.0 is negative"),
        ({"teacher_model": "a", "chunk_size": 8}, "chunked is false"),
        ({"teacher_model": "a", "layer_map": [0, 1]}, "layer_map is about features"),
        ({"teacher_model": "a", "layer_map": [0.5, 1], "features": {"hidden_mse": 1}}, "distill.layer_map"),
        ({"teacher_model": "a", "features": ["hidden_mse"]}, "distill.features"),
        ({"teacher_model": "a", "features": {"hidden_mse": -1}}, "-1 is no weight"),
        ({"teacher_model": "a", "features": {"relations": {"relation_heads": -1}}}, "no whole number above 0"),
        ({"teacher_model": "a", "features": {"rkd_angle": {"positions": "8"}}}, "no whole number above 0"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=message):
        trainer(tiny("llama"), tmp_path, [Distillation(**options)])


def test_each_loss_says_the_range_of_its_options() -> None:
    """What a mixture cannot have is forward KL to alpha-beta."""
    Distillation("a", loss="alpha_beta", alpha=1.0, beta=0.0).check()
    Distillation("a", loss="alpha_beta", alpha=0.5, beta=1.5).check()
