"""Every feature loss: what changes nothing, what is 0, and that padding and other sequences play no part."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.errors import CompressError
from hf_compress.losses import losses

FEATURES = [e.name for e in losses if e.traits["kind"] not in ("logits", "values")]
WIDTH, POSITIONS = 12, 10
MASK = torch.ones(2, POSITIONS, dtype=torch.bool)
MASK[1, 7:] = False


def states(name: str, width: int = WIDTH) -> Any:
    kind = losses.entry(name).traits["kind"]
    if kind == "attention":
        return torch.randn(2, 3, POSITIONS, POSITIONS).softmax(-1)
    if kind in ("qkv", "flow"):
        return tuple(torch.randn(2, POSITIONS, width) for _ in range(3 if kind == "qkv" else 2))
    return torch.randn(2, POSITIONS, width)


def each(x: Any, change: Any) -> Any:
    return tuple(map(change, x)) if isinstance(x, tuple) else change(x)


def rotation(width: int = WIDTH) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]


def test_all_that_the_field_uses_are_there() -> None:
    wanted = "hidden_mse squarehead hidden_l2 hidden_cosine attention_kl attention_mse relations rkd_distance "
    wanted += "rkd_angle gram fsp cka router_kl expert_usage"
    assert set(wanted.split()) == set(FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_zero_at_equality_positive_elsewhere(name: str) -> None:
    teacher = states(name)
    assert losses[name](teacher, teacher, MASK).abs().max() < 1e-5
    assert (losses[name](states(name), teacher, MASK) > 1e-4).all()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def relation_kl(s: Tensor, t: Tensor) -> Tensor:
    """Of one sequence, (positions, width) each, in four heads."""
    q, p = (torch.stack([(x @ x.T / x.shape[1] ** 0.5).softmax(-1) for x in y.chunk(4, -1)]) for y in (s, t))
    return kl(p, q).mean()


def distances(x: Tensor) -> Tensor:
    found = torch.stack([(x[i] - x[j]).norm() for i in range(len(x)) for j in range(len(x)) if i != j])
    return found / found.mean()


def angles(x: Tensor) -> Tensor:
    """At j, between i and k, all three different."""
    order = [p for p in product(range(len(x)), repeat=3) if len(set(p)) == 3]
    return torch.stack([torch.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0) for i, j, k in order])


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def unbiased_hsic(a: Tensor, b: Tensor) -> Tensor:
    """Song et al. 2012, equation 5, of kernels with a zero diagonal."""
    n, one = len(a), torch.ones(len(a), dtype=a.dtype)
    both = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
    return ((a @ b).trace() + both - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))


def cka(s: Tensor, t: Tensor) -> Tensor:
    a, b = ((x.double() @ x.double().T).fill_diagonal_(0) for x in (s, t))
    return (1 - unbiased_hsic(a, b) / (unbiased_hsic(a, a) * unbiased_hsic(b, b)).sqrt()).float()


BY_HAND: dict[str, Any] = {  # of one sequence without padding
    "hidden_mse": lambda s, t: ((s - t).square().mean(-1) / t.square().mean(-1)).mean(),
    "squarehead": lambda s, t: (s - t).square().mean() / t.square().mean(),
    "hidden_l2": lambda s, t: (s - t).square().mean(),
    "hidden_cosine": lambda s, t: (1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean(),
    "attention_kl": lambda s, t: kl(t, s).mean(),
    "attention_mse": lambda s, t: (s - t).square().sum(-1).mean(),
    "relations": lambda s, t: sum(relation_kl(*pair) for pair in zip(s, t)) / 3,
    "rkd_distance": lambda s, t: F.smooth_l1_loss(distances(s), distances(t)),
    "rkd_angle": lambda s, t: F.smooth_l1_loss(angles(s), angles(t)),
    "gram": lambda s, t: (unit(s @ s.T) - unit(t @ t.T)).square().sum(),
    "fsp": lambda s, t: (unit(s[0].T @ s[1]) - unit(t[0].T @ t[1])).square().sum(),
    "cka": cka,
    "router_kl": lambda s, t: kl(t.softmax(-1), s.softmax(-1)).mean(),
    "expert_usage": lambda s, t: kl(t.softmax(-1).mean(0), s.softmax(-1).mean(0)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_each_is_its_formula(name: str) -> None:
    student, teacher = states(name), states(name)
    at = (lambda x: x[1, :, :7]) if losses.entry(name).traits["kind"] == "attention" else (lambda x: x[1, :7])
    expected = BY_HAND[name](each(student, at), each(teacher, at))
    torch.testing.assert_close(losses[name](student, teacher, MASK)[1], expected, rtol=1e-4, atol=1e-6)


def test_rkd_thins_long_sequences_evenly() -> None:
    """Of 10 and 7 positions, 4 are compared: 0, 2, 5, 7 and 0, 1, 3, 5."""
    student, teacher = states("rkd_distance"), states("rkd_distance")
    for name, formula in (("rkd_distance", distances), ("rkd_angle", angles)):
        found = losses[name](student, teacher, MASK, positions=4)
        for row, chosen in enumerate(([0, 2, 5, 7], [0, 1, 3, 5])):
            expected = F.smooth_l1_loss(formula(student[row, chosen]), formula(teacher[row, chosen]))
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_padding_and_neighbours_change_nothing(name: str) -> None:
    """More padding, other numbers in it, and a sequence alone: the same values and no gradient from padding."""
    student, teacher = states(name), states(name)
    value = losses[name](student, teacher, MASK)
    alone = losses[name](each(student, lambda x: x[1:]), each(teacher, lambda x: x[1:]), MASK[1:])
    torch.testing.assert_close(alone, value[1:])
    if losses.entry(name).traits["kind"] == "attention":
        return  # maps hold exact zeros at padded keys, which the model makes
    dirty = each(student, lambda x: torch.where(MASK[..., None], x, 100.0).requires_grad_())
    found = losses[name](dirty, each(teacher, lambda x: torch.where(MASK[..., None], x, -7.0)), MASK)
    torch.testing.assert_close(found, value)
    for x in dirty if isinstance(dirty, tuple) else (dirty,):
        gradient = torch.autograd.grad(found.sum(), x, retain_graph=True)[0]
        assert torch.isfinite(gradient).all()
        assert gradient[~MASK].abs().max() == 0
        assert gradient[MASK].abs().max() > 0
    cut = losses[name](each(student, lambda x: x[1:, :7]), each(teacher, lambda x: x[1:, :7]), MASK[1:, :7])
    torch.testing.assert_close(cut, value[1:])


@pytest.mark.parametrize("name", FEATURES)
def test_a_sequence_without_positions_is_worth_nothing(name: str) -> None:
    student = each(states(name), lambda x: x.requires_grad_())
    empty = MASK.clone()
    empty[1] = False
    value = losses[name](student, states(name), empty)
    assert value[1].abs() < 1e-6
    first = student[0] if isinstance(student, tuple) else student
    assert torch.isfinite(torch.autograd.grad(value.sum(), first)[0]).all()


@pytest.mark.parametrize("name", ["hidden_mse", "squarehead"])
def test_normalized_errors_are_one_for_a_zero_student_and_ignore_scale(name: str) -> None:
    student, teacher = states(name), states(name)
    torch.testing.assert_close(losses[name](torch.zeros_like(student), teacher, MASK), torch.ones(2))
    torch.testing.assert_close(losses[name](5 * student, 5 * teacher, MASK), losses[name](student, teacher, MASK))


def test_squarehead_is_a_ratio_of_sums() -> None:
    student, teacher = states("squarehead"), states("squarehead")
    expected = (student[1, :7] - teacher[1, :7]).square().mean() / teacher[1, :7].square().mean()
    torch.testing.assert_close(losses["squarehead"](student, teacher, MASK)[1], expected)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "gram", "cka"])
def test_rotation_scale_and_width_change_nothing(name: str) -> None:
    student, teacher = states(name), states(name, 2 * WIDTH)
    value = losses[name](student, teacher, MASK)
    torch.testing.assert_close(
        losses[name](3 * student @ rotation(), teacher @ rotation(2 * WIDTH), MASK), value, rtol=1e-3, atol=1e-5
    )


def test_rkd_ignores_translation_and_cka_too_but_not_an_affine_map() -> None:
    student = states("cka")
    for name in ("rkd_distance", "rkd_angle", "cka"):
        assert losses[name](student + 4.0, student, MASK).abs().max() < 1e-3
    stretched = student * torch.linspace(0.1, 10, WIDTH)
    assert losses["cka"](stretched, student, MASK).min() > 0.05


def test_debiased_cka_of_independent_states_is_zero_alignment() -> None:
    """Loss 1 on average; the usual estimator would call 200 x 64 independent states alike (0.24)."""
    mask = torch.ones(40, 200, dtype=torch.bool)
    found = losses["cka"](torch.randn(40, 200, 64), torch.randn(40, 200, 64), mask)
    assert abs(float(found.mean()) - 1) < 0.01


def test_relations_are_invariant_to_rotation_within_a_head_only() -> None:
    student, teacher = states("relations"), states("relations", 2 * WIDTH)
    value = losses["relations"](student, teacher, MASK, relation_heads=3)
    within = torch.block_diag(*(rotation(4) for _ in range(3)))
    torch.testing.assert_close(
        losses["relations"](each(student, lambda x: x @ within), teacher, MASK, relation_heads=3), value
    )
    across = losses["relations"](each(student, lambda x: x @ rotation()), teacher, MASK, relation_heads=3)
    assert (across - value).abs().max() > 1e-3
    with pytest.raises(CompressError, match="relation heads"):
        losses["relations"](student, teacher, MASK, relation_heads=5)


def test_usage_is_blind_to_which_token_goes_where() -> None:
    teacher = states("expert_usage")
    shuffled = teacher[:, torch.tensor([3, 1, 0, 2, 6, 5, 4, 7, 8, 9])]
    assert losses["expert_usage"](shuffled, teacher, MASK).abs().max() < 1e-5
    assert (losses["router_kl"](shuffled, teacher, MASK) > 0.1).all()


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "fsp", "router_kl", "expert_usage", "attention_kl"])
def test_unequal_numbers_are_named(name: str) -> None:
    other = states(name, 2 * WIDTH)
    other = other[:, :2] if name == "attention_kl" else other
    with pytest.raises(CompressError, match=name):
        losses[name](states(name), other, MASK)
