"""What is trained is what ships: rounding is seen in the forward, absent from the state_dict, and left in the weights
at the end."""

from pathlib import Path

import pytest
import torch

from hf_compress.errors import CompressError
from hf_compress.grids import Grid, codes, fake_quantize, fake_quantize_ste, scales
from hf_compress.techniques.qat import QAT
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import trainer

IDS = torch.arange(3, 19)[None]


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 16), Grid(3, 8)])
def test_rounding_is_within_half_a_step_idempotent_and_keeps_zero(grid: Grid) -> None:
    matrix = torch.randn(6, 32)
    matrix[0] = 0
    matrix[:, ::3] = 0
    scale = scales(matrix, grid)
    once = fake_quantize(matrix, scale, grid)
    step = scale.repeat_interleave(32 // scale.shape[1], 1)
    assert ((once - matrix).abs() <= step / 2 + 1e-6).all()
    assert (once[matrix == 0] == 0).all()
    assert torch.equal(codes(once, scales(once, grid), grid), codes(matrix, scale, grid))


def test_gradient_passes_straight_through() -> None:
    matrix = torch.randn(4, 8, requires_grad=True)
    upstream = torch.randn(4, 8)
    (fake_quantize_ste(matrix, Grid(4)) * upstream).sum().backward()
    assert torch.equal(matrix.grad, upstream)


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "bert"])
def test_forward_during_training_equals_the_finalized_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    keys, dense = set(model.state_dict()), model(IDS).logits
    run = trainer(model, tmp_path, [QAT(4, 32)], max_steps=2)
    with torch.no_grad():
        simulated = run.model.eval()(IDS).logits
    assert not torch.allclose(simulated, dense, atol=1e-3)
    assert set(run.model.state_dict()) == keys
    run.techniques[0].finalize(run.model)
    with torch.no_grad():
        torch.testing.assert_close(run.model(IDS).logits, simulated, atol=1e-5, rtol=1e-4)
    for weight in weights(run.model):
        assert len(weight.matrix.unflatten(1, (-1, 32))[0, 0].unique()) <= 15


def test_checkpointed_training_moves_the_real_weights(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [QAT(8)], max_steps=2, activation_checkpointing=True)
    before = [w.matrix.clone() for w in weights(run.model)]
    run.train()
    assert all(not torch.equal(a, w.matrix) for a, w in zip(before, weights(run.model), strict=True))
    assert all(w.attribute not in w.module.__dict__ for w in weights(run.model))


def test_group_size_must_divide(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="does not divide"):
        trainer(tiny("llama"), tmp_path, [QAT(4, 48)])
