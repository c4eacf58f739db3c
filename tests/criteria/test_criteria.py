"""Each criterion against what defines it."""

import pytest
import torch

from hf_compress.criteria import ONESHOT, TRAINING, Statistics, criteria, seed_of, usable
from hf_compress.errors import CompressError
from hf_compress.patterns import mask_of


def test_wanda_with_equal_inputs_is_magnitude_per_row_and_ignores_the_scale_of_inputs() -> None:
    weight, norm = torch.randn(8, 16), torch.rand(16) + 0.1

    def score(x: torch.Tensor) -> torch.Tensor:
        return mask_of(criteria["wanda"](weight, Statistics(input_norm=x)), sparsity=0.5, group="row")

    assert torch.equal(
        score(torch.full((16,), 3.0)), mask_of(criteria["magnitude"](weight, Statistics()), sparsity=0.5, group="row")
    )
    assert torch.equal(score(norm), score(norm * 7))


def test_random_is_the_same_for_a_name_and_another_for_others() -> None:
    def drawn(name: str, seed: int = 0) -> torch.Tensor:
        return criteria["random"](torch.randn(4, 8), Statistics(seed=seed_of(name, seed)))

    assert torch.equal(drawn("a.weight"), drawn("a.weight"))
    assert not torch.equal(drawn("a.weight"), drawn("b.weight"))
    assert not torch.equal(drawn("a.weight"), drawn("a.weight", seed=1))


def test_taylor_is_the_loss_of_a_removal_where_the_loss_is_linear() -> None:
    weight, slope = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    scores = criteria["taylor"](weight, Statistics(gradient=slope))
    removed = weight.clone()
    removed[1, 2] = 0
    assert scores[1, 2] == pytest.approx(abs(float((removed * slope).sum() - (weight * slope).sum())), rel=1e-6)


def test_taylor2_is_the_loss_of_a_removal_at_the_minimum_of_a_quadratic() -> None:
    weight, curvature = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    scores = criteria["taylor2"](weight, Statistics(fisher=curvature))
    removed = weight.clone()
    removed[1, 2] = 0
    assert scores[1, 2] == pytest.approx(float((curvature * (removed - weight).square()).sum() / 2), rel=1e-6)


def test_gradient_activation_without_gradients_is_wanda_and_tokens_change_nothing() -> None:
    weight, norm, fisher = torch.randn(6, 8), torch.rand(8) + 0.1, torch.rand(6, 8)
    score = criteria["gradient_activation"]
    without = score(weight, Statistics(tokens=4, input_norm=norm, fisher=torch.zeros(6, 8)))
    torch.testing.assert_close(without, criteria["wanda"](weight, Statistics(input_norm=norm)) / 2)
    once, twice = (score(weight, Statistics(tokens=4 * n, input_norm=norm * n**0.5, fisher=fisher)) for n in (1, 2))
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(once - without, weight.abs() * 100 * fisher.sqrt(), rtol=1e-4, atol=1e-4)


def test_movement_keeps_the_sign() -> None:
    moved = torch.randn(3, 4)
    assert torch.equal(criteria["movement"](torch.randn(3, 4), Statistics(movement=moved)), moved)


def test_obs_is_the_loss_of_a_row_refitted_without_the_weight() -> None:
    inputs = torch.randn(64, 6) @ torch.randn(6, 6)
    inputs[:, 5] = 0  # a dead input
    hessian, weight = inputs.T @ inputs, torch.randn(3, 6)
    scores = criteria["obs"](weight, Statistics(hessian=hessian))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)
    for row in range(3):
        for gone in range(5):
            rest = [j for j in range(6) if j != gone]
            # minimise d H d^T over d with d[gone] = -weight: d[rest] = H_rr^-1 H_rg w
            step = torch.linalg.solve(damped[rest][:, rest], damped[rest, gone] * weight[row, gone])
            change = torch.zeros(6)
            change[rest], change[gone] = step, -weight[row, gone]
            assert scores[row, gone] == pytest.approx(float(change @ damped @ change), rel=2e-3)
    assert (scores[:, 5] == 0).all()


def test_obs_with_equal_independent_inputs_orders_as_magnitude() -> None:
    weight = torch.randn(5, 8)
    scores = criteria["obs"](weight, Statistics(hessian=3 * torch.eye(8)))
    torch.testing.assert_close(scores, weight.square() * 3 * 1.01, rtol=1e-4, atol=1e-5)


def test_every_criterion_scores_a_matrix_in_fp32_without_changing_it() -> None:
    statistics = Statistics(
        tokens=9,
        input_norm=torch.rand(8),
        hessian=torch.eye(8),
        gradient=torch.randn(4, 8),
        fisher=torch.rand(4, 8),
        movement=torch.randn(4, 8),
    )
    for entry in criteria:
        weight = torch.randn(4, 8).to(torch.bfloat16)
        before = weight.clone()
        scores = entry.value(weight, statistics)
        assert scores.shape == (4, 8)
        assert scores.dtype == torch.float32
        assert torch.equal(weight, before)
        assert entry.traits["group"] in ("row", "layer")
        assert set(entry.traits["needs"]) <= ONESHOT | TRAINING


def test_criteria_are_refused_where_their_statistics_are_not_collected() -> None:
    with pytest.raises(CompressError, match=r"'obs' needs the hessian, which training does not collect"):
        usable("obs", TRAINING, during="training", where="prune.criterion")
    with pytest.raises(CompressError, match=r"'movement' needs the movement, which one-shot pruning") as error:
        usable("movement", ONESHOT, during="one-shot pruning", where="criterion")
    assert "magnitude" in error.value.next_step
    with pytest.raises(CompressError, match="did you mean 'taylor'"):
        usable("tailor", TRAINING, during="training", where="criterion")
