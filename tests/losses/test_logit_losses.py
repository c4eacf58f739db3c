"""Every logit loss: its slope against autograd, its limits, and what it is worth at equality."""

import math

import pytest
import torch
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses
from hf_compress.techniques.soft_targets import SoftTargets

LOGIT = [entry.name for entry in losses if entry.traits["kind"] == "logits"]


def logits(rows: int = 5, classes: int = 9, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(rows, classes, dtype=torch.float64), scale * torch.randn(
        rows, classes, dtype=torch.float64
    )


def value(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0, **options: float) -> Tensor:
    return SoftTargets(name, temperature, options)(student, teacher)[0]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def test_all_that_the_field_uses_are_there() -> None:
    wanted = "forward_kl reverse_kl jsd jsd_normalized skew_kl skew_reverse_kl total_variation alpha_beta"
    assert set(wanted.split()) == set(LOGIT)


ODD = {"jsd": {"beta": 0.2}, "jsd_normalized": {"beta": 0.7}, "skew_kl": {"alpha": 0.4}}


CASES = [(name, ODD.get(name, {})) for name in (*LOGIT, "mse")]
CASES += [("alpha_beta", {"alpha": a, "beta": b}) for a, b in ((0.2, 0.7), (0.0, 0.6), (0.6, 0.0), (0.0, 1.0))]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradient_is_that_of_finite_differences(name: str, options: dict[str, float], temperature: float) -> None:
    """The value alone decides what the gradient must be; the closed form knows nothing of this."""
    student, teacher = logits()
    _, gradient = SoftTargets(name, temperature, options)(student.clone(), teacher)
    step = 1e-5
    for column in range(student.shape[1]):
        moved = torch.zeros_like(student)
        moved[:, column] = step
        up, down = (value(name, student + sign * moved, teacher, temperature, **options) for sign in (1, -1))
        torch.testing.assert_close(gradient[:, column], (up - down) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "mse"])
def test_slope_is_the_derivative_by_log_probabilities(name: str, options: dict[str, float]) -> None:
    """Each log-probability on its own, as if they need not sum to 1: a constant times q would not show above."""
    log_q, log_p = (x.log_softmax(-1) for x in logits())
    loss, step = losses[name], 1e-5
    _, slope = loss(log_q.clone(), log_p.clone(), **options)
    for column in range(log_q.shape[1]):
        moved = torch.zeros_like(log_q)
        moved[:, column] = step
        up, down = (loss(log_q + sign * moved, log_p.clone(), **options)[0] for sign in (1, -1))
        torch.testing.assert_close(slope[:, column], (up - down) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOGIT)
def test_zero_and_without_gradient_at_equality_only(name: str) -> None:
    student, teacher = logits()
    same, gradient = SoftTargets(name, 2.0)(teacher + 3.0, teacher)  # logits are equal up to a constant
    assert same.abs().max() < 1e-9
    assert name == "total_variation" or gradient.abs().max() < 1e-9
    assert (value(name, student, teacher) > 1e-3).all()


def test_forward_kl_gradient_is_t_times_q_minus_p() -> None:
    student, teacher = logits()
    _, gradient = SoftTargets("forward_kl", 3.0)(student, teacher)
    torch.testing.assert_close(gradient, 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_at_high_temperature_is_centred_squared_error(name: str) -> None:
    student, teacher = logits()
    difference = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
    limit = difference.square().sum(-1) / (2 * student.shape[-1])
    errors = [float(((value(name, student, teacher, t) - limit) / limit).abs().max()) for t in (10.0, 100.0, 1000.0)]
    assert errors[2] < 0.01
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # falls as 1 / T


def test_jsd_is_bounded_symmetric_and_has_trl_s_ends() -> None:
    student, teacher = logits(scale=20.0)
    half = value("jsd", student, teacher, beta=0.5)
    assert ((half >= 0) & (half <= math.log(2) + 1e-12)).all()
    torch.testing.assert_close(half, value("jsd", teacher, student, beta=0.5))
    torch.testing.assert_close(value("jsd", student, teacher, beta=0.0), kl(teacher, student))
    torch.testing.assert_close(value("jsd", student, teacher, beta=1.0), kl(student, teacher))


def test_jsd_normalized_is_continuous_at_its_ends() -> None:
    student, teacher = logits()
    for beta, limit in ((1e-6, kl(teacher, student)), (1 - 1e-6, kl(student, teacher))):
        torch.testing.assert_close(value("jsd_normalized", student, teacher, beta=beta), limit, rtol=1e-3, atol=0)
        torch.testing.assert_close(
            value("jsd_normalized", student, teacher, beta=round(beta)), limit, rtol=1e-9, atol=0
        )


def test_skew_is_kl_at_zero_and_bounded() -> None:
    student, teacher = logits(scale=30.0)
    torch.testing.assert_close(value("skew_kl", student, teacher, alpha=0.0), kl(teacher, student))
    torch.testing.assert_close(value("skew_reverse_kl", student, teacher, alpha=0.0), kl(student, teacher))
    for name in ("skew_kl", "skew_reverse_kl"):
        assert (value(name, student, teacher, alpha=0.1) <= -math.log(0.1)).all()


def test_alpha_beta_has_the_known_divergences_at_its_corners_and_is_continuous_there() -> None:
    student, teacher = logits()
    q, p = student.softmax(-1), teacher.softmax(-1)
    for alpha, beta, expected in (
        (1.0, 0.0, kl(teacher, student)),
        (0.0, 1.0, kl(student, teacher)),
        (0.5, 0.5, 2 * (p.sqrt() - q.sqrt()).square().sum(-1)),
        (1.0, 1.0, (p - q).square().sum(-1) / 2),
    ):
        torch.testing.assert_close(value("alpha_beta", student, teacher, alpha=alpha, beta=beta), expected)
        near = value("alpha_beta", student, teacher, alpha=alpha or 1e-5, beta=beta or 1e-5)
        torch.testing.assert_close(near, expected, rtol=1e-3, atol=1e-4)


def test_taid_is_the_loss_at_one_and_has_no_gradient_at_zero() -> None:
    student, teacher = logits()
    for name in LOGIT:
        whole = SoftTargets(name, 2.0)(student.clone(), teacher)
        torch.testing.assert_close(SoftTargets(name, 2.0, share=1.0)(student.clone(), teacher), whole)
        same, none = SoftTargets(name, 2.0, share=0.0)(student.clone(), teacher)
        assert max(float(same.abs().max()), float(none.abs().max())) < 1e-9
    found, gradient = SoftTargets("forward_kl", 2.0, share=0.3)(student.clone(), teacher)
    between = 0.7 * student + 0.3 * teacher
    torch.testing.assert_close(found, 4 * kl(between / 2, student / 2))
    torch.testing.assert_close(
        gradient, 2 * ((student / 2).softmax(-1) - (between / 2).softmax(-1))
    )  # target detached


def test_total_variation_is_half_the_absolute_difference() -> None:
    student, teacher = logits()
    expected = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(value("total_variation", student, teacher), expected)


@pytest.mark.parametrize("name", LOGIT)
def test_finite_for_probabilities_that_underflow(name: str) -> None:
    """Mixtures are made in log space: a probability of exp(-400) is 0 in fp32."""
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[0, 0], teacher[0, 1] = 400.0, 400.0
    found, gradient = SoftTargets(name)(student, teacher)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jsd", {"beta": 1.5}),
        ("skew_kl", {"alpha": 1.0}),
        ("alpha_beta", {"alpha": -0.1, "beta": 1.0}),
        ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, float]) -> None:
    with pytest.raises(CompressError, match=next(iter(options))):
        SoftTargets(name, 1.0, options)(*logits())
