"""Intervals and speed-ups are paired; what is counted is what is there."""

from pathlib import Path

import pytest
import torch

from hf_compress.backends import quantize
from hf_compress.data import Data
from hf_compress.errors import CompressError
from hf_compress.evaluation import Evaluate, evaluate
from hf_compress.evaluation.artefacts import open_folder
from hf_compress.evaluation.cost import cpu_name, paired_latency, parameter_counts, sparsity
from hf_compress.evaluation.quality import paired_difference
from hf_compress.verification import verify, write_expectation
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import WORDS, save_reviews, save_tokenizer


def test_equal_answers_differ_by_exactly_nothing() -> None:
    correct = torch.stack([(torch.rand(200) < 0.8).double(), torch.ones(200)], 1)
    assert paired_difference(correct, correct, "text-classification") == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_interval_is_paired_and_holds_the_truth() -> None:
    base = torch.stack([(torch.rand(2000) < 0.8).double(), torch.ones(2000)], 1)
    worse = base.clone()
    worse[:100, 0] = 0  # pairing sees only the rows that changed
    found = paired_difference(base, worse, "text-classification")
    assert found["value"] == pytest.approx(-float(base[:100, 0].sum()) / 2000)
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] < 0.02


def test_perplexity_ratio_of_a_constant_loss_difference_is_exact() -> None:
    base = torch.stack([torch.rand(50).double() * 9 + 30, torch.full((50,), 10.0)], 1)
    worse = base + torch.tensor([1.0, 0.0])
    found = paired_difference(base, worse, "causal-lm")
    assert found["low"] == pytest.approx(found["high"])
    assert found["value"] == pytest.approx(float(torch.tensor(0.1).exp()))


def test_latency_is_interleaved_and_compared_with_the_first() -> None:
    order: list[str] = []
    found = paired_latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=4, warmup=1)
    assert order[2:] == ["a", "b"] * 4
    assert set(found["b"]) - set(found["a"]) == {"speedup_wall", "speedup_cpu"}


def test_a_cpu_is_named_with_the_instructions_that_int8_needs() -> None:
    one = "processor\t: {}\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 {}\n\n"
    assert cpu_name(one.format(0, "") + one.format(1, "")) == "AMD EPYC, avx2"
    assert cpu_name(one.format(0, "avx512_vnni avx512f")) == "AMD EPYC, avx2, avx512f, avx512_vnni"


def test_active_parameters_count_the_experts_a_token_meets() -> None:
    counts = parameter_counts(tiny("deepseek_v3"))
    experts = sum(w.shape[0] * w.shape[1] for w in weights(tiny("deepseek_v3"), ["expert"]))
    assert counts["parameters"] - counts["active_parameters"] == experts // 2


@pytest.mark.parametrize(("name", "backend"), [("deepseek_v3", "compressed-tensors"), ("llama", "bitsandbytes")])
def test_packed_models_have_the_parameters_they_had(name: str, backend: str, tmp_path: Path) -> None:
    model = tiny(name)
    quantize(model, tmp_path / "out", backend=backend, bits=4, group_size=32 if name == "deepseek_v3" else None)
    opened = open_folder("root", str(tmp_path / "out"), "causal-lm")
    assert parameter_counts(opened.model) == parameter_counts(model)
    assert opened.weights_bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))


def test_a_folder_without_tokenizer_borrows_the_dense_models_or_says_so(tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "dense")
    quantize(tiny("llama", vocab_size=len(WORDS)), tmp_path / "out", bits=8)
    assert verify(str(tmp_path / "out"))[str(tmp_path / "out")]["logits_difference"] < 1e-3
    data = Data(str(save_reviews(tmp_path / "reviews.csv")), eval_size=8)
    spec = Evaluate(metrics=["quality"])
    with pytest.raises(CompressError, match="neither folder holds a tokenizer"):
        evaluate(tmp_path / "out", tmp_path / "dense", data=data, spec=spec)
    save_tokenizer(tmp_path / "dense")
    found = evaluate(str(tmp_path / "out"), str(tmp_path / "dense"), data=data, spec=spec)
    assert found["artefacts"]["root"]["perplexity"]["n"] == 8


def test_a_candidate_settles_before_each_of_its_timed_calls() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    assert paired_latency(calls, repeats=2, warmup=1, settle=2).keys() == {"a", "b"}
    assert called == [*"ab", *"aaabbb", *"aaabbb"]


def test_sparsity_counts_zeros() -> None:
    model = tiny("llama")
    for weight in weights(model):
        weight.matrix[:, ::4] = 0
    assert sparsity(model) == 0.25


def test_equal_answers_are_asked_for_by_a_tolerance_of_0(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "out")
    write_expectation(tiny("llama", seed=1), tmp_path / "out")
    with pytest.raises(CompressError, match="logits differ"):
        verify(tmp_path / "out", tolerance=0)
