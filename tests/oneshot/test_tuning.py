"""What is left of a block moves together toward the dense block's answers, and nothing else moves; bfloat16 where
fast."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress import precision
from hf_compress.calibration import cut
from hf_compress.grids import Grid, codes, fake_quantize, scales
from hf_compress.oneshot import Solved, Solver, compress_blocks, prune, run_blocks, solvers
from hf_compress.oneshot.calls import Block, Call, first_call, halve
from hf_compress.oneshot.memory import InMemory
from hf_compress.oneshot.tuning import Rounded, Tuning, _Levels, tune
from hf_compress.patterns import mask_of
from hf_compress.weights import Weight, blocks_of, weights
from tests.models import tiny
from tests.oneshot.test_oneshot import batches

BLOCK = 1


@torch.no_grad()
def pruned_block(name: str, **changes: object) -> tuple[PreTrainedModel, Block, list[Call], list[Weight]]:
    """A model whose second block has half of its weights, and the calls of that block with the dense outputs."""
    model = tiny(name, **changes)
    given = batches()
    calls = [first_call(model, blocks_of(model)[BLOCK], batch) for batch in given]
    halve(calls, given)
    block = Block(model, BLOCK)
    for call in calls:
        call.dense = block.whole(call, call.hidden)
    found = [w for w in weights(model) if w.block == BLOCK]
    for weight in found:
        weight.matrix.mul_(mask_of(weight.matrix.abs(), sparsity=0.5))
    return model, block, calls, found


@torch.no_grad()
def error(block: Block, calls: list[Call]) -> float:
    """Mean over tokens of the squared error over the wanted square, by the formula."""
    errors = []
    for call in calls:
        out, wanted = block.whole(call, call.hidden).float(), call.dense.float()
        each = (out - wanted).square().sum(-1) / wanted.square().sum(-1)
        errors.append(each[call.mask].mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "qwen2_moe"])
def test_the_error_falls_and_only_survivors_move(name: str) -> None:
    model, block, calls, found = pruned_block(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = {w.name: w.matrix != 0 for w in found}
    first = error(block, calls)
    tune(block, calls, found, Tuning(epochs=6))
    assert error(block, calls) < 0.8 * first
    for weight in found:
        assert torch.equal(weight.matrix != 0, kept[weight.name]), weight.name
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {w.parameter for w in found}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_was_not_pruned_stays_even_beside_experts_that_were() -> None:
    _, block, calls, found = pruned_block("deepseek_v3")
    left = {w.name: w.matrix.clone() for w in found if w.expert == 2 or "q_b" in w.name}
    tune(block, calls, [w for w in found if w.name not in left], Tuning())
    assert len(left) == 3
    for weight in found:
        assert weight.name not in left or torch.equal(weight.matrix, left[weight.name])


def test_the_loss_is_the_relative_error_of_tokens_that_are_not_padding() -> None:
    _, block, calls, found = pruned_block("llama")
    expected = error(block, calls)
    for call in calls:
        call.dense = torch.where(call.mask[..., None], call.dense, torch.full_like(call.dense, 1e9))
    (loss,) = tune(block, calls, found, Tuning(epochs=1, rate=1e-9))
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_order_of_the_batches_changes_nothing() -> None:
    def tuned(reverse: bool) -> list[Tensor]:
        _, block, calls, found = pruned_block("llama")
        tune(block, calls[::-1] if reverse else calls, found, Tuning())
        return [w.matrix for w in found]

    assert all(map(torch.equal, tuned(False), tuned(True)))


def test_how_the_caller_cut_the_text_into_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a step, whoever hands over four or sixteen; two and four rows in one batch would step otherwise."""
    monkeypatch.setattr("hf_compress.oneshot.engine.STEP_TOKENS", 2 * batches()[0]["input_ids"].shape[1])
    found = []
    for size in (4, 16):
        model = tiny("llama")
        given = [{k: v.clone() for k, v in b.items()} for b in batches(size)]
        compress_blocks(model, given, solvers["alps"](sparsity=0.5))
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_short_text_is_cut_finer_so_that_there_are_steps_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr("hf_compress.oneshot.engine.tune", lambda block, calls, *others: steps.append(len(calls)))
    for long in (1, 60):
        given = [{name: rows.repeat(1, long) for name, rows in batch.items()} for batch in batches(16)]
        compress_blocks(tiny("llama", max_position_embeddings=2048), given, solvers["alps"](sparsity=0.5))
    assert steps == [16] * 4  # a row each: 14 tokens because they are few, 840 because they are over 512


def test_batches_are_cut_to_so_many_tokens_or_one_row() -> None:
    rows = {"input_ids": torch.arange(35).view(7, 5), "attention_mask": torch.ones(7, 5)}
    made = cut([rows, rows], 10)
    assert [len(batch["input_ids"]) for batch in made] == [2, 2, 2, 1] * 2
    for name, values in rows.items():
        assert torch.equal(torch.cat([batch[name] for batch in made]), torch.cat([values, values]))
    assert [len(batch["input_ids"]) for batch in cut([rows], 3)] == [1] * 7


def test_half_precision_weights_are_moved_by_less_than_their_rounding() -> None:
    """Each step is below bfloat16's resolution; all of them together are not."""
    _, block, calls, found = pruned_block("llama", dtype=torch.bfloat16)
    before = [w.matrix.clone() for w in found]
    tune(block, calls, found, Tuning(epochs=40, rate=4e-4))
    moved = [float((w.matrix != old).float().mean()) for w, old in zip(found, before, strict=True)]
    assert min(moved) > 0.2


def test_the_engine_tunes_after_it_has_solved() -> None:
    def halved(group: list[Weight], statistics: object) -> list[Solved]:
        return [Solved(w.matrix * mask_of(w.matrix.abs(), sparsity=0.5)) for w in group]

    def distance(tuning: Tuning | None) -> float:
        model, dense = tiny("llama"), tiny("llama")
        run_blocks(model, batches(), Solver(halved, ("input_norm",), tuning=tuning), InMemory(model, None, ""))
        with torch.no_grad():
            ours, theirs = (m(**batches()[0]).logits for m in (model, dense))
        return float((ours - theirs).norm() / theirs.norm())

    assert distance(Tuning(epochs=6)) < 0.9 * distance(None)


# Levels and scales


@torch.no_grad()
def rounded_block(name: str, grid: Grid) -> tuple[Block, list[Call], list[Weight], dict[str, Rounded]]:
    """As `pruned_block`, then rounded to the nearest: pruned weights must stay 0."""
    _, block, calls, found = pruned_block(name)
    rounded = {}
    for weight in found:
        scale = scales(weight.matrix, grid)
        ratio = (grid.groups(weight.matrix) / scale[..., None]).flatten(1)
        rounded[weight.name] = Rounded(scale, ratio.masked_fill(weight.matrix == 0, torch.nan))
        weight.matrix.copy_(fake_quantize(weight.matrix, scale, grid))
    return block, calls, found, rounded


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, 32, "nf4")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_levels_move_on_their_grid_and_the_error_falls(name: str, grid: Grid) -> None:
    block, calls, found, rounded = rounded_block(name, grid)
    first, before = error(block, calls), {w.name: w.matrix.clone() for w in found}
    start = {name: each.scale for name, each in rounded.items()}
    tune(block, calls, found, Tuning(20, 0.05, lambda name: grid), rounded)
    assert error(block, calls) < 0.9 * first
    changed = 0
    for weight in found:
        new = rounded[weight.name]
        pruned = new.ratio.isnan()
        assert (weight.matrix[pruned] == 0).all()
        assert (fake_quantize(weight.matrix, new.scale, grid) - weight.matrix).abs().max() < 1e-6
        changed += int(
            (codes(weight.matrix, new.scale, grid) != codes(before[weight.name], start[weight.name], grid)).sum()
        )
    assert changed > 100
    assert any(not torch.equal(rounded[name].scale, start[name]) for name in start)


def test_gradients_of_levels_and_scales_are_those_of_autograd() -> None:
    """Straight through the rounding, and through the clipping where nothing is beyond the grid."""
    grid = Grid(3, 32)
    _, _, found, rounded = rounded_block("llama", grid)
    weight = found[0]
    given = rounded[weight.name]
    given.ratio = given.ratio.clone()
    given.ratio[0, :4] = 9.0  # beyond the grid
    mover = _Levels(weight, given, grid, 0.01)
    weight.whole.grad = torch.randn(weight.whole.shape, generator=torch.Generator().manual_seed(0))
    mover.pull()
    ratio, factor = (t.detach().clone().requires_grad_() for t in (mover._ratio, mover._factor))
    straight = ratio + (mover._level - ratio).detach()
    values = (grid.groups(straight) * (given.scale * factor)[..., None]).flatten(1)
    (values * weight.of(weight.whole.grad)).sum().backward()
    expected = ratio.grad.masked_fill(given.ratio.isnan(), 0)
    expected[0, :4] = 0
    torch.testing.assert_close(mover._ratio.grad, expected)
    torch.testing.assert_close(mover._factor.grad, factor.grad)
    assert (expected[:, :4] == 0).sum() > 3


def test_the_rounding_solver_tunes_and_reports_the_scales_it_ends_with() -> None:
    def distance(epochs: int) -> float:
        model, dense, grid = tiny("llama"), tiny("llama"), Grid(2, 32)
        report = compress_blocks(model, batches(), solvers["gptq"](grid=grid, epochs=epochs))
        for weight in weights(model):
            assert (fake_quantize(weight.matrix, report.scales[weight.name], grid) - weight.matrix).abs().max() < 1e-6
        with torch.no_grad():
            ours, theirs = (m(**batches()[0]).logits for m in (model, dense))
        return float((ours - theirs).norm() / theirs.norm())

    assert distance(10) < 0.9 * distance(0)


def test_a_weight_is_tuned_on_the_grid_of_its_own() -> None:
    model, name = tiny("llama"), "model.layers.0.self_attn.k_proj.weight"
    report = compress_blocks(model, batches(), solvers["gptq"](grid=Grid(2, 32), grids={name: Grid(8)}, epochs=1))
    (weight,) = [w for w in weights(model) if w.name == name]
    assert codes(weight.matrix, report.scales[name], Grid(8)).abs().max() > 50


# bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_an_fp32_model_is_run_in_bfloat16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    model, seen = tiny("llama").to(dtype), []
    mlp = blocks_of(model)[0].mlp
    hook = mlp.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    prune(model, batches(), method="sparsegpt", sparsity=0.5)
    hook.remove()
    assert seen
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    assert seen[0] == (dtype, half)  # norms stay as they are, products do not


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_bfloat16_costs_no_quality(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "llama"
    plain, fast = tiny(name), tiny(name)
    prune(plain, batches(), method=method, sparsity=0.5)
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    prune(fast, batches(), method=method, sparsity=0.5)
    assert any(not torch.equal(a.matrix, b.matrix) for a, b in zip(weights(plain), weights(fast), strict=True))
    with torch.no_grad():
        dense, one, two = (m(**batches()[0]).logits for m in (tiny(name), plain, fast))
    assert (two - dense).norm() < 1.15 * (one - dense).norm()  # masks differ where scores all but tie
