"""Intervals and speed-ups are paired; what is counted is what is there."""

import pytest
import torch

from hf_compress.evaluation.cost import paired_latency, parameter_counts, sparsity
from hf_compress.evaluation.quality import paired_difference
from hf_compress.weights import weights
from tests.models import tiny


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


def test_active_parameters_count_the_experts_a_token_meets() -> None:
    counts = parameter_counts(tiny("deepseek_v3"))
    experts = sum(w.shape[0] * w.shape[1] for w in weights(tiny("deepseek_v3"), ["expert"]))
    assert counts["parameters"] - counts["active_parameters"] == experts // 2


def test_sparsity_counts_zeros() -> None:
    model = tiny("llama")
    for weight in weights(model):
        weight.matrix[:, ::4] = 0
    assert sparsity(model) == 0.25
