"""A teacher's answers written down: unbiased, small, resumable, refused when stale or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import hf_compress.teacher_cache as writer
from hf_compress.cli import app
from hf_compress.data import Prepared
from hf_compress.errors import CompressError
from hf_compress.source import ModelSource
from hf_compress.teacher_cache import cache_teacher
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.offline import Cache, Sampled, TopK, row_key
from hf_compress.techniques.soft_targets import Online, SoftTargets
from tests.contracts.test_loss_scale import models
from tests.models import tiny
from tests.training import WORDS, collate, rows, save_reviews, save_tokenizer, trainer

CLASSES = 40


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    tiny("llama", seed=1).save_pretrained(tmp_path / "teacher")
    return save_tokenizer(tmp_path / "teacher")


def write(teacher: Path, folder: Path, data: Any = None, **options: Any) -> Path:
    prepared = Prepared(rows() if data is None else data, rows(), collate)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    return cache_teacher(ModelSource(id=str(teacher)), prepared, tokenizer, folder, **options)


def draws(p: torch.Tensor, n: int, count: int) -> torch.Tensor:
    return torch.multinomial(p.expand(count, -1), n, replacement=True)


def test_samples_are_unbiased_where_renormalized_top_k_is_not() -> None:
    teacher, student = 2 * torch.randn(CLASSES), 2 * torch.randn(CLASSES)
    p, q = teacher.softmax(-1), student.softmax(-1)
    entropy = -(p * p.log()).sum()
    ids = draws(p, 12, 40_000)
    sampled = Sampled(ids, entropy.expand(len(ids)))
    sampled.chunk(torch.arange(len(ids)))
    sampled.block(slice(None))
    value, gradient = sampled.learn(student.expand(len(ids), -1), SoftTargets("forward_kl"))
    assert value.mean() == pytest.approx(float((p * (p / q).log()).sum()), abs=0.02)
    assert (gradient.mean(0) - (q - p)).abs().sum() < 0.03
    _, at_equality = sampled.learn(teacher.expand(len(ids), -1), SoftTargets("forward_kl"))
    assert at_equality.mean(0).abs().sum() < 0.03
    kept = p.topk(12).indices
    renormalized = torch.zeros_like(p).scatter(0, kept, p[kept] / p[kept].sum())
    assert (p - renormalized).abs().sum() > 0.1  # the pull at equality that this form does not have


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_with_a_tail_has_no_gradient_at_equality_and_the_right_one_elsewhere(temperature: float) -> None:
    teacher, student = 2 * torch.randn(3, CLASSES), 2 * torch.randn(3, CLASSES, requires_grad=True)
    logs, ids = (teacher / temperature).log_softmax(-1).topk(5)
    cached = TopK(ids, logs)
    cached.chunk(torch.arange(3))
    cached.block(slice(None))
    soft = SoftTargets("forward_kl", temperature)
    value, gradient = cached.learn(student.detach().clone(), soft)
    q = (student / temperature).softmax(-1)
    kept, p = q.gather(-1, ids), logs.exp()
    tails = 1 - p.sum(-1), 1 - kept.sum(-1)
    expected = temperature**2 * ((p * (p / kept).log()).sum(-1) + tails[0] * (tails[0] / tails[1]).log())
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-3, atol=1e-5)
    assert cached.learn(teacher.clone(), soft)[1].abs().max() < 1e-5


def test_top_k_s_tail_is_exact_for_a_student_that_leaves_little_of_it() -> None:
    """1 - the sum of what is kept, in fp32, would be mostly rounding."""
    teacher, student = 2 * torch.randn(20, CLASSES), torch.randn(20, CLASSES)
    student[:, 0] += torch.linspace(10, 22, 20)
    teacher[:, 0] += 5
    logs, ids = teacher.log_softmax(-1).topk(5)
    found = []
    for dtype in (torch.float32, torch.float64):
        cached = TopK(ids, logs.to(dtype))
        cached.chunk(torch.arange(20))
        cached.block(slice(None))
        found.append(cached.learn(student.to(dtype), SoftTargets("forward_kl"))[1].double())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [Sampled, TopK])
def test_a_block_is_those_rows_of_its_chunk(kind: type[Sampled] | type[TopK]) -> None:
    """Rows 4, 0, 2, 1 of a batch, of which the last two are asked for."""
    ids, student = torch.stack([torch.randperm(CLASSES)[:6] for _ in range(5)]), torch.randn(2, CLASSES)
    rest = torch.rand(5) if kind is Sampled else (torch.rand(5, 6) / 6).log()
    cached, alone = kind(ids, rest), kind(ids[[2, 1]], rest[[2, 1]])
    cached.chunk(torch.tensor([4, 0, 2, 1]))
    cached.block(slice(2, 4))
    alone.chunk(torch.arange(2))
    alone.block(slice(None))
    soft = SoftTargets("forward_kl", 2.0)
    torch.testing.assert_close(cached.learn(student.clone(), soft), alone.learn(student.clone(), soft))


def test_a_student_padded_to_more_classes_learns_the_teacher_s_only() -> None:
    """As from the teacher itself: what the padding holds plays no part."""
    teacher, student, soft = torch.randn(3, CLASSES), torch.randn(3, CLASSES + 8), SoftTargets("forward_kl", 2.0)
    log_p = (teacher / 2).log_softmax(-1)
    ids = draws(log_p.exp()[0], 300_000, 3)
    logs, likeliest = log_p.topk(CLASSES - 1)
    teachers = [
        Online(lambda part: teacher[part]),
        Sampled(ids, -(log_p.exp() * log_p).sum(-1), CLASSES),
        TopK(likeliest, logs, CLASSES),
    ]
    found = []
    for one in teachers:
        one.chunk(torch.arange(3))
        one.block(slice(None))
        found.append(one.learn(student.clone(), soft))
        assert found[-1][1].shape == student.shape
        assert found[-1][1][:, CLASSES:].abs().max() == 0
    for value, gradient in found[1:]:
        torch.testing.assert_close(value[0], found[0][0][0], rtol=0.05, atol=0.01)
        assert (gradient[0] - found[0][1][0]).abs().sum() < 0.03


@pytest.mark.parametrize("chunked", [False, True])
def test_training_from_many_samples_is_training_from_the_teacher(chunked: bool, teacher: Path, tmp_path: Path) -> None:
    cache = write(teacher, tmp_path / "cache", samples=3000)
    found = {}
    for name, options in (("cache", {"teacher_cache": str(cache)}), ("online", {"teacher_model": str(teacher)})):
        technique = Distillation(chunked=chunked, chunk_size=7 if chunked else None, **options)
        run = trainer(tiny("llama"), tmp_path, [technique], optim="sgd", max_grad_norm=0, max_steps=2)
        before = {k: v.clone() for k, v in run.model.state_dict().items()}
        run.train()
        moved = torch.cat([(v - before[k]).flatten() for k, v in run.model.state_dict().items()])
        logged = [e["loss_distill"] for e in run.state.log_history if "loss_distill" in e]
        found[name] = moved, logged
        assert run.evaluate()["eval_loss"] > 0
        assert ("eval_kl" in run.state.log_history[-1]) == (name == "online")
    assert found["cache"][1] == pytest.approx(found["online"][1], rel=0.03)
    moved = found["cache"][0], found["online"][0]
    assert (moved[0] - moved[1]).norm() / moved[1].norm() < 0.05


def test_training_from_top_k_of_everything_is_training_from_the_teacher(teacher: Path, tmp_path: Path) -> None:
    cache = write(teacher, tmp_path / "cache", kind="topk", samples=127)
    values = []
    for options in ({"teacher_cache": str(cache)}, {"teacher_model": str(teacher)}):
        run = trainer(tiny("llama"), tmp_path, [Distillation(**options)], max_steps=1)
        run.train()
        values.append(run.state.log_history[0]["loss_distill"])
    assert values[0] == pytest.approx(values[1], rel=0.01)


def test_resumed_and_shared_out_caches_are_the_same(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROWS", 3)
    whole = write(teacher, tmp_path / "whole")
    shared = tmp_path / "shared"
    for part in ((1, 2), (0, 2)):
        write(teacher, shared, part=part)
        if part == (1, 2):
            with pytest.raises(CompressError, match="not finished"):
                Cache(shared)
    wholes, parts = ([f.read_bytes() for f in sorted(folder.glob("*.parquet"))] for folder in (whole, shared))
    assert len(wholes) == 6
    assert wholes == parts
    times = {f: f.stat().st_mtime_ns for f in whole.glob("*.parquet")}
    (whole / "00002.parquet").unlink()
    write(teacher, whole)
    assert [f.read_bytes() for f in sorted(whole.glob("*.parquet"))] == wholes
    again = {f for f in times if f.stat().st_mtime_ns != times[f]}
    assert {f.name for f in again} == {"00002.parquet"}


def test_bytes_of_a_position(teacher: Path, tmp_path: Path) -> None:
    """12 draws of two bytes and an entropy of two: 26 bytes, a 630th of 4,096 logits in fp32."""
    data = Dataset.from_list([{"input_ids": [3 + i % 100] * 60, "labels": [3 + i % 100] * 60} for i in range(256)])
    cache = write(teacher, tmp_path / "cache", data)
    assert writer.bytes_of(cache) / (256 * 59) < 30


def damaged(cache: Path) -> None:
    file = cache / "00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def test_damaged_stale_and_foreign_caches_are_refused(teacher: Path, tmp_path: Path) -> None:
    cache = write(teacher, tmp_path / "cache")

    def attempt(**options: Any) -> None:
        student = tiny("llama", **options.pop("student", {}))
        run = trainer(student, tmp_path, [])
        run.processing_class = PreTrainedTokenizerFast.from_pretrained(options.pop("tokenizer", teacher))
        technique = Distillation(teacher_cache=str(cache), **options)
        technique.check()
        technique.attach(run.model)
        technique.prepare(run)

    attempt()
    attempt(teacher_model=str(teacher))
    other = save_tokenizer(tmp_path / "other", [*WORDS, "more"])
    tiny("llama", seed=2).save_pretrained(tmp_path / "other")
    for options, message in (
        ({"temperature": 1.0}, "temperature"),
        ({"tokenizer": other}, "another tokenizer"),
        ({"teacher_model": str(tmp_path / "other")}, "stale"),
        ({"student": {"vocab_size": 64}}, "vocabulary"),
        ({"features": {"cka": 1.0}}, "features"),
        ({"loss": "jsd"}, "forward_kl"),
    ):
        with pytest.raises(CompressError, match=message):
            attempt(**options)
    with pytest.raises(CompressError, match="another temperature"):
        write(teacher, cache, temperature=1.0)
    run = trainer(tiny("llama"), tmp_path, [Distillation(teacher_cache=str(cache))])
    run.train_dataset = rows().map(lambda row: {"input_ids": row["input_ids"][1:], "labels": row["labels"][1:]})
    with pytest.raises(CompressError, match="not in the cache"):
        run.train()
    shard, note = cache / "00000.parquet", cache / "00000.json"
    whole = shard.read_bytes()
    for spoil in (lambda: damaged(cache), lambda: note.write_text('{"rows"'), note.unlink):
        spoil()
        with pytest.raises(CompressError, match=r"cut off or changed[\s\S]*run the cache-teacher command again"):
            attempt()
        write(teacher, cache)
        assert shard.read_bytes() == whole
        attempt()
    (cache / "cache.json").unlink()
    with pytest.raises(CompressError, match="no teacher cache"):
        attempt()


def test_a_teacher_with_nan_writes_nothing(teacher: Path, tmp_path: Path) -> None:
    broken = tiny("llama", seed=1)
    broken.lm_head.weight.data[0] = torch.nan
    broken.save_pretrained(tmp_path / "teacher")
    with pytest.raises(CompressError, match="not finite"):
        write(tmp_path / "teacher", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.parquet"))


def test_encoder_decoders_and_classifiers_have_no_cache(tmp_path: Path) -> None:
    student, teacher = models("t5")
    teacher.save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    with pytest.raises(CompressError, match="only causal"):
        trainer(student, tmp_path, [Distillation(teacher_cache=str(tmp_path / "cache"))])
    tiny("bert").save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    for kind in ("t5", "bert"):
        with pytest.raises(CompressError, match="causal"):
            write(tmp_path / kind, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    for text in ('{"teacher": "a', "{}"):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(CompressError, match=r"cache.json is damaged"):
            Cache(tmp_path)


def test_rows_are_told_apart_by_tokens_and_labels() -> None:
    assert row_key([1, 2, 3], [1, 2, 3]) != row_key([1, 2, 3], [-100, 2, 3])
    assert row_key([1, 2], [1, 2]) != row_key([1, 2, 3], [1, 2, 3])


def test_command(tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    recipe = {
        "name": "cached",
        "model": {"id": str(tmp_path / "model")},
        "data": {"id": str(save_reviews(tmp_path / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True},
        "stages": [{"train": {"distill": {"teacher_cache": str(tmp_path / "cache")}, "args": {"max_steps": 1}}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    common = ["cache-teacher", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, common)
    assert done.exit_code == 0, done.output
    assert "MB" in done.output
    assert Cache(tmp_path / "cache").facts["samples"] == len(WORDS)
    for wrong in ("4", "a/b", "3/2"):
        assert isinstance(CliRunner().invoke(app, [*common, "--part", wrong]).exception, CompressError)
    cold = ["cache-teacher", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "cold"), "--temperature", "0"]
    assert isinstance(CliRunner().invoke(app, cold).exception, CompressError)
    assert not (tmp_path / "cold").exists()
    done = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "out" / "hf_compress.json").read_text())["stages"][0]["facts"]
    assert facts["techniques"]["Distillation"]["teacher"] == str(tmp_path / "model")


def test_command_writes_what_the_recipe_s_model_can_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by its tokenizer, of a padded vocabulary its own classes; a teacher of other tokens before any work."""
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    tiny("llama", seed=1, vocab_size=16).save_pretrained(tmp_path / "padded")
    tiny("llama", seed=1, vocab_size=len(WORDS)).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other", WORDS[:3] + WORDS[:2:-1])
    (tmp_path / "empty").mkdir()
    recipe = {
        "name": "cached",
        "model": {"id": str(tmp_path / "model"), "revision": "v1"},
        "data": {"id": str(save_reviews(tmp_path / "r.csv")), "eval_size": 16, "max_length": 16},
        "stages": [{"train": {"distill": {"teacher_cache": str(tmp_path / "cache")}, "args": {"max_steps": 1}}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    common = ["cache-teacher", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "cache"), "--teacher"]
    for name, message in (("other", "another tokenizer"), ("empty", "cannot read"), ("none", "no such folder")):
        refused = CliRunner().invoke(app, [*common, str(tmp_path / name)]).exception
        assert isinstance(refused, CompressError)
        assert message in str(refused)
        assert not (tmp_path / "cache").exists()
    done = CliRunner().invoke(app, [*common, str(tmp_path / "padded")])
    assert done.exit_code == 0, done.output
    cache = Cache(tmp_path / "cache")
    assert cache.facts["vocabulary"] == len(WORDS)
    assert max(int(row["ids"].max()) for row in cache.rows) < len(WORDS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    cache.check(temperature=2.0, tokenizer=tokenizer, teacher=None, vocabulary=len(WORDS))

    asked: list[ModelSource] = []
    monkeypatch.setattr(writer, "cache_teacher", lambda source, *_, **__: asked.append(source))
    monkeypatch.setattr(writer, "bytes_of", lambda _: 0)
    assert CliRunner().invoke(app, [*common, str(tmp_path / "padded")]).exit_code == 0
    assert asked[0].revision is None  # v1 is of another repository
