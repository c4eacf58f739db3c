"""What is trained is what ships: rounding is seen in the forward, absent from the state_dict, and left in the weights
at the end."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_compress import calibration
from hf_compress.calibration import with_continuations
from hf_compress.errors import CompressError
from hf_compress.grids import Grid, codes
from hf_compress.oneshot import compress_blocks, solvers
from hf_compress.oneshot.memory import InMemory
from hf_compress.techniques.calibrated_start import training_batches
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.techniques.rounding import Rounding
from hf_compress.trainer import CompressionTrainer
from hf_compress.trainers import QATTrainer
from hf_compress.weights import weights
from tests.models import tiny
from tests.ranks import on_two_ranks
from tests.training import collate, rows, trainer

IDS = torch.arange(3, 19)[None]
SMALL = {"num_hidden_layers": 1}
EVERY = {
    "absmax": {"bits": 4, "group_size": 32},
    "learned": {"bits": 3, "group_size": 32, "method": "lsq"},
    "two bits": {"bits": 2, "method": "lsq", "scale_start": "mean"},
    "nf4": {"kind": "nf4", "group_size": 64, "method": "lsq"},
    "fp4": {"kind": "fp4", "group_size": 16},
    "powers": {"kind": "powers", "bits": 3, "freeze_after": 1},
    "codebook": {"kind": "codebook", "bits": 3, "group_size": 32, "method": "lsq"},
    "offset": {"kind": "uint", "bits": 4, "group_size": 32, "method": "lsq"},
    "scales": {"bits": 3, "group_size": 32, "method": "scales"},
    "scales, offset": {"kind": "uint", "bits": 4, "group_size": 32, "method": "scales"},
}
FULL = {"bits": 4, "group_size": 32, "method": "lsq", "activations": 8, "ranges": "percentile"}


class Watch(TrainerCallback):
    """What the student answers after each step, in evaluation mode."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self.logits = student, list[torch.Tensor]()

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        self.logits.append(self.student.eval()(IDS).logits)
        self.student.train()


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
def test_the_forward_during_training_is_the_finalized_model(name: str, options: dict, tmp_path: Path) -> None:
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 2}
    model = tiny(name, **layers)
    keys, dense = set(model.state_dict()), model(IDS).logits
    qat = QAT(**options)
    run = trainer(model, tmp_path, [qat], max_steps=2, learning_rate=1e-3)
    with torch.no_grad():
        assert not torch.allclose(run.model.eval()(IDS).logits, dense, atol=1e-3)
    assert set(run.model.state_dict()) == keys
    watch = Watch(model)
    run.add_callback(watch)
    run.train()
    with torch.no_grad():
        assert torch.equal(run.model.eval()(IDS).logits, watch.logits[-1])
    assert set(run.model.state_dict()) == keys
    assert qat.scales.keys() == {w.name for w in weights(model)}
    for weight in weights(model):
        scale = qat.scales[weight.name]
        shape = (weight.shape[0], weight.shape[1] // (options.get("group_size") or weight.shape[1]))
        assert scale.shape == shape
        each = weight.matrix.unflatten(1, (shape[1], -1))[0, 0]
        assert len(each.unique()) <= 1 << options.get("bits", 4)
        if options.get("kind", "int") == "int":
            level = codes(weight.matrix, scale, Grid(options["bits"], options.get("group_size")))
            assert torch.equal((level.unflatten(1, (shape[1], -1)) * scale[..., None]).flatten(1), weight.matrix)


def test_rounding_begins_late_and_scales_freeze(tmp_path: Path) -> None:
    def losses(*techniques):
        run = trainer(tiny("llama", **SMALL), tmp_path, list(techniques), max_steps=8, learning_rate=1e-3)
        seen: dict[int, torch.Tensor] = {}

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if techniques:
                    seen[state.global_step] = techniques[0]._roundings[0].theta.detach().clone()

        run.add_callback(Look())
        run.train()
        return [e["loss"] for e in run.state.log_history if "loss" in e], seen

    dense, _ = losses()
    late, theta = losses(QAT(2, method="lsq", begin=0.5, freeze_after="6 steps"))
    assert late[:4] == dense[:4]
    assert late[4] != dense[4]
    assert torch.equal(theta[1], theta[4])
    assert not torch.equal(theta[5], theta[6])
    assert torch.equal(theta[6], theta[8])
    fresh = trainer(tiny("llama", **SMALL), tmp_path, [QAT(2, begin="5 steps")], max_steps=4)
    with pytest.raises(CompressError, match="begins at step 5, and the run has 4"):
        fresh.train()
    fresh = trainer(tiny("llama", **SMALL), tmp_path, [QAT(2, begin="3 steps", freeze_after=0.5)], max_steps=4)
    with pytest.raises(CompressError, match="freeze at step 2"):
        fresh.train()
    assert not _attached(QAT(4, begin=0.5)).settled(0, 8)


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_a_run_that_ends_before_rounding_began_says_so(method: str, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    run = trainer(tiny("llama", **SMALL), tmp_path, [QAT(4, method=method, begin=0.5)], max_steps=8)
    run.add_callback(Stop())
    with pytest.raises(CompressError, match="before step 4, where rounding begins"):
        run.train()
    assert all(w.attribute not in w.module.__dict__ for w in weights(run.model))  # the plain model is left


def test_a_frozen_range_clips_what_grows(tmp_path: Path) -> None:
    qat = QAT(4, freeze_after="1 step")
    run = trainer(tiny("llama", **SMALL), tmp_path, [qat], max_steps=4, learning_rate=0.1)
    before = [r.parts[0].matrix.abs().amax(1) for r in qat._roundings]
    run.train()
    for weight, first in zip(weights(run.model), before, strict=True):
        assert (weight.matrix.abs().amax(1) <= 8 / 7 * (first + 0.1 + 1e-5)).all()  # one step of 0.1 came before
    assert all(r.frozen for r in qat._roundings)


def test_gradients_of_learned_scales(tmp_path: Path) -> None:
    weight = weights(tiny("llama", **SMALL))[0]
    rounding = Rounding([weight], Grid(3, 16), learn=True)
    rounding.begin(weight.whole)
    scale = (rounding._kept["sign"] * rounding.theta.detach().exp())[..., None]
    upstream = torch.randn(weight.shape)
    (rounding(weight.whole) * upstream).sum().backward()
    v = weight.matrix.unflatten(1, (-1, 16)) / scale
    each = torch.where((v > -4) & (v < 3), v.round().clamp(-4, 3) - v, v.round().clamp(-4, 3))
    expected = (each * upstream.unflatten(1, (-1, 16)) * scale).sum(-1) / (16 * 3) ** 0.5
    torch.testing.assert_close(rounding.theta.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int", "nf4", "uint"])
def test_where_scales_alone_train_a_level_is_their_slope(kind: str) -> None:
    weight = weights(tiny("llama", **SMALL))[0]
    rounding = Rounding([weight], Grid(4, 64, kind, pinned=kind == "nf4"), learn=True, fixed=True)
    rounding.begin(weight.whole)
    upstream, before = torch.randn(weight.shape), weight.matrix.detach().clone()
    kept = list[torch.Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = rounding(weight.whole)
    large = [tensor for tensor in kept if tensor.numel() >= out.numel()]
    assert [tensor.data_ptr() for tensor in large] == [weight.whole.data_ptr()]  # no copy of it, nor its levels
    torch.testing.assert_close(out, before, rtol=1e-6, atol=1e-8)  # begin left it on its grid
    (out * upstream).sum().backward()
    expected = (before * upstream).unflatten(1, (-1, 64)).sum(-1) / (64 * 7) ** 0.5
    torch.testing.assert_close(rounding.theta.grad, expected, atol=1e-5, rtol=1e-4)
    assert weight.whole.grad is None
    with torch.no_grad():
        rounding.theta.add_(0.7)  # far enough that every level would be another in steps of the new scale
        moved = rounding(weight.whole).unflatten(1, (-1, 64))
    torch.testing.assert_close(moved, before.unflatten(1, (-1, 64)) * math.exp(0.7), rtol=1e-5, atol=1e-7)


SCALES = {"bits": 3, "group_size": 32, "method": "scales", "start": "gptq", "samples": 16}


@pytest.mark.parametrize(
    ("options", "args"),
    [(SCALES, {}), (SCALES, {"bf16": True}), ({"kind": "nf4", "group_size": 64, "method": "scales"}, {})],
    ids=["int", "bf16", "nf4"],
)
def test_scales_alone_train_and_codes_stay(options: dict, args: dict, tmp_path: Path) -> None:
    model = tiny("deepseek_v3", num_hidden_layers=2)
    zero = weights(model)[0].matrix[:, :3]
    zero.zero_()
    weights(model)[1].whole.requires_grad_(False)  # whoever froze it finds it frozen
    qat = QAT(**options)
    run = trainer(model, tmp_path, [qat], max_steps=3, learning_rate=1e-2, **args)
    assert not any(w.whole.requires_grad for w in weights(model))
    begun, norm = list[tuple[torch.Tensor, torch.Tensor]](), model.model.norm.weight.detach().clone()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                found = ((r._kept["first"], r._rows(r.parts[0].whole.detach())) for r in qat._roundings)
                begun.extend((first.clone(), stored.clone()) for first, stored in found)

    run.add_callback(Look())
    run.train()
    moved = 0
    for rounding, (first, stored) in zip(qat._roundings, begun, strict=True):
        scale = torch.cat([qat.scales[part.name] for part in rounding.parts])
        after = codes(rounding._rows(rounding.parts[0].whole), scale, qat.grid)
        assert torch.equal(after, codes(stored, first, qat.grid))
        moved += int((scale != first).sum())
    assert moved > 0
    assert (zero == 0).all()
    assert not torch.equal(model.model.norm.weight, norm)
    assert [w.whole.requires_grad for w in weights(model)][:3] == [True, False, True]


def test_scales_neither_vanish_nor_change_sign(tmp_path: Path) -> None:
    qat = QAT(3, 16, method="lsq")
    run = trainer(tiny("llama", **SMALL), tmp_path, [qat], max_steps=6, learning_rate=0.3, max_grad_norm=0)
    before = {r.name: r._kept["sign"].clone() for r in qat._roundings}
    run.train()
    for name, scale in qat.scales.items():
        assert torch.isfinite(scale).all()
        assert torch.equal(scale.sign(), before[name])
        assert (scale != 0).all()


@pytest.mark.parametrize("kind", ["nf4", "int"])
def test_a_group_that_begins_at_zero_can_grow(kind: str) -> None:
    model = tiny("llama", **SMALL)
    (weight, *_) = weights(model)
    weight.matrix[:, :64] = 0
    rounding = Rounding([weight], QAT(4, 64, kind=kind).grid, learn=True)
    rounding.begin(weight.whole)
    assert rounding.theta is not None
    assert bool((rounding.theta > -20).all())


def test_learned_scales_train_at_a_rate_of_their_own_without_decay(tmp_path: Path) -> None:
    run = trainer(tiny("llama", **SMALL), tmp_path, [QAT(4, method="lsq")], learning_rate=1e-3, weight_decay=0.1)
    group = run.create_optimizer().param_groups[-1]
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.0)
    assert len(group["params"]) == len(weights(run.model))


class Deaf(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self._parameters["weight"], self.bias)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_that_does_not_read_its_rounded_weight_is_an_error(frozen: bool, tmp_path: Path) -> None:
    model = tiny("llama", **SMALL)
    model.model.layers[0].mlp.up_proj.__class__ = Deaf
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(not frozen)
    with pytest.raises(CompressError, match="did not read it") as error:
        trainer(model, tmp_path, [QAT(4)]).train()
    assert "mlp.up_proj.weight" in str(error.value)


def test_the_same_for_adapters(tmp_path: Path) -> None:
    model = tiny("llama", **SMALL)
    student = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    run = trainer(student, tmp_path, [QAT(4)])
    model.model.layers[0].mlp.up_proj.get_base_layer().__class__ = Deaf
    with pytest.raises(CompressError, match="did not read it"):
        run.train()


@pytest.mark.parametrize(("adapted", "start"), [(False, "dense"), (True, "dense"), (False, "gptq")])
def test_zeros_stay_under_learned_and_pinned_grids(adapted: bool, start: str, tmp_path: Path) -> None:
    model: Any = tiny("llama", **SMALL)
    student = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)) if adapted else model
    qat = QAT(kind="nf4", group_size=64, method="lsq", start=start)
    run = trainer(student, tmp_path, [Pruning(0.5, "2:4", schedule="oneshot"), qat], max_steps=3)
    watch = Watch(student)
    run.add_callback(watch)
    run.train()
    for weight in weights(run.model):
        assert ((weight.matrix.reshape(-1, 4) != 0).sum(1) <= 2).all()
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(IDS).logits, watch.logits[-1], atol=1e-5, rtol=1e-5)


def trained(folder: Path, options: dict, **args: Any) -> dict[str, torch.Tensor]:
    qat, model = QAT(**options), tiny("llama", **SMALL)
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    run = trainer(model, folder, [qat], **(settings | args))
    run.train()
    found = {k: v.clone() for k, v in run.model.state_dict().items()} | {
        f"scale {k}": v for k, v in qat.scales.items()
    }
    ranges = qat._inputs.ranges if qat._inputs is not None else {}
    return found | {f"range {k}": torch.tensor(v) for k, v in ranges.items()}


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    one = trained(tmp_path, FULL, per_device_train_batch_size=4)
    four = trained(tmp_path, FULL, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert any(key.startswith("range") for key in one)
    torch.testing.assert_close(four, one, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("options", [FULL, SCALES], ids=["full", "scales"])
def test_recomputed_activations_change_nothing(options: dict, tmp_path: Path) -> None:
    torch.testing.assert_close(trained(tmp_path, options, activation_checkpointing=True), trained(tmp_path, options))


@pytest.mark.parametrize("options", ["FULL", "GPTQ", "SCALES"])
def test_two_ranks_equal_one(options: str, tmp_path: Path) -> None:
    one = trained(tmp_path, globals()[options], per_device_train_batch_size=4)
    first, second = on_two_ranks(__name__, f"trained(folder, {options}, per_device_train_batch_size=2)", tmp_path)
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    torch.testing.assert_close(first, one, atol=2e-5, rtol=1e-3)


GPTQ = {"bits": 3, "group_size": 32, "method": "lsq", "start": "gptq", "samples": 16}


FROM_GPTQ = {
    "learned": GPTQ | {"skip": ["attention|attn"]},
    "learned, tuned": GPTQ | {"start_epochs": 2},
    "nf4": {"kind": "nf4", "group_size": 64, "start": "gptq", "samples": 16},
    "nf4, tuned": {"kind": "nf4", "group_size": 64, "start": "gptq", "samples": 16, "start_epochs": 1},
    "scales": SCALES,
    "scales, tuned": SCALES | {"start_epochs": 2},
}


@pytest.mark.parametrize("options", FROM_GPTQ.values(), ids=FROM_GPTQ)
@pytest.mark.parametrize("name", ["bert", "deepseek_v3"])
def test_what_does_not_train_stays_what_gptq_made(name: str, options: dict, tmp_path: Path) -> None:
    qat, model, twin = QAT(**options), tiny(name, num_hidden_layers=2), tiny(name, num_hidden_layers=2)
    run = trainer(model, tmp_path, [qat], max_steps=2, learning_rate=0.0)
    batches, names = training_batches(trainer(twin, tmp_path, []), 16), [w.name for w in qat._weights]
    solver = solvers["gptq"](grid=qat.grid, epochs=options.get("start_epochs", 0))
    scales = compress_blocks(twin, batches, solver, only=names).scales
    run.train()
    assert qat.scales.keys() == scales.keys()
    for ours, theirs in zip(weights(run.model), weights(twin), strict=True):
        torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=1e-6, atol=0)
        if ours.name in scales:
            torch.testing.assert_close(qat.scales[ours.name].float(), scales[ours.name].float(), rtol=1e-6, atol=0)
    assert qat.facts()["calibration_tokens"] == sum(len(row["input_ids"]) for row in rows())


def test_the_model_writes_rows_for_gptq_before_it_is_rounded(tmp_path: Path) -> None:
    qat, twin = QAT(**GPTQ, continuations=1), tiny("llama", **SMALL)
    run = trainer(tiny("llama", **SMALL), tmp_path, [qat], max_steps=2, learning_rate=0.0)
    batches = training_batches(trainer(twin, tmp_path, []), 16)
    more = with_continuations(twin, batches, 1, seed=run.args.seed)
    compress_blocks(twin, more, solvers["gptq"](grid=qat.grid), only=[w.name for w in qat._weights])
    run.train()
    for ours, theirs in zip(weights(run.model), weights(twin), strict=True):
        torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=1e-6, atol=0)
    assert qat.facts()["calibration_tokens"] == 2 * sum(len(row["input_ids"]) for row in rows())
    assert qat.facts()["continuations"] == 1


def test_rows_for_gptq_come_from_any_dataset(tmp_path: Path) -> None:
    class Plain(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": [index + 3] * 5, "labels": [index + 3] * 5, "comment": "not for the model"}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return (Plain()[i] for i in range(16))

    run, listed = trainer(tiny("llama", **SMALL), tmp_path, []), Dataset.from_list([Plain()[i] for i in range(16)])
    for given in (Plain(), Stream(), listed, listed.to_iterable_dataset()):
        run.train_dataset = given
        before = torch.get_rng_state()
        first, again = training_batches(run, 10), training_batches(run, 10)
        assert torch.equal(torch.get_rng_state(), before)
        assert [len(batch["input_ids"]) for batch in first] == [8, 2]
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
        assert len(torch.cat([batch["input_ids"][:, 0] for batch in first]).unique()) == 10
    run.data_collator = lambda some: {"input_ids": torch.tensor([row["input_ids"] for row in some])}
    assert bool(training_batches(run, 4)[0]["attention_mask"].all())


RESUMED = {
    "learned": FULL | {"begin": "2 steps", "freeze_after": "4 steps"},
    "from gptq": GPTQ | {"begin": "2 steps"},
    "codebook": {"kind": "codebook", "bits": 3, "freeze_after": "3 steps", "activations": 8},
    "scales": SCALES,
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_resumed_at_any_step_equals_uninterrupted(options: dict, tmp_path: Path) -> None:
    def begin(seed: int):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
        return trainer(tiny("llama", seed=seed, **SMALL), tmp_path, [QAT(**options)], **settings)

    whole = begin(0)
    whole.train()
    expected = {k: v.clone() for k, v in whole.model.state_dict().items()}
    for step in (1, 2, 3, 5):
        resumed = begin(5)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = resumed.model.state_dict()
        assert all(torch.equal(found[k], expected[k]) for k in expected), step
        for name, scale in whole.techniques[0].scales.items():
            assert torch.equal(resumed.techniques[0].scales[name], scale)
        assert resumed.techniques[0].facts() == whole.techniques[0].facts()
    learned = {"method": "lsq", "bits": 4, "group_size": 16, "kind": "int"}
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()  # as save_only_model leaves it
    for changed in (learned, {"method": "lsq"}) if options.get("method") == "scales" else (learned,):
        other = trainer(tiny("llama", **SMALL), tmp_path, [QAT(**(options | changed))])
        with pytest.raises(CompressError, match="not those of this run"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_checkpointed_training_moves_the_real_weights(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [QAT(8)], max_steps=2, activation_checkpointing=True)
    before = [w.matrix.clone() for w in weights(run.model)]
    run.train()
    assert all(not torch.equal(a, w.matrix) for a, w in zip(before, weights(run.model), strict=True))
    assert all(w.attribute not in w.module.__dict__ for w in weights(run.model))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"bits": 9}, "not between 2 and 8"),
        ("llama", {"bits": 3, "kind": "nf4"}, "nf4 has 4 bits"),
        ("llama", {"kind": "int8"}, "unknown kind"),
        ("llama", {"method": "lsqq"}, "did you mean 'lsq'"),
        ("llama", {"group_size": 0}, "not positive"),
        ("llama", {"group_size": 48}, r"does not divide(.|\n)*layers.0.self_attn.q_proj.weight"),
        ("llama", {"ranges": "mse"}, "those are not rounded"),
        ("llama", {"activations": 8, "ranges": "histogram"}, "unknown ranges"),
        ("llama", {"activations": 8, "ranges": "percentile", "percentile": 20}, "no percentage"),
        ("llama", {"begin": 1.0}, "begins where the run ends"),
        ("llama", {"bits": "4"}, "is no whole number"),
        ("llama", {"bits": 4, "group_size": "32"}, "is no whole number"),
        ("llama", {"begin": "sometime"}, "no moment of a run"),
        ("llama", {"begin": 0.5, "freeze_after": 0.25}, "freeze before rounding begins"),
        ("llama", {"scale_rate": 0.0}, "does not train"),
        ("llama", {"start": "gtpq"}, "did you mean 'gptq'"),
        ("llama", GPTQ | {"method": "ste"}, "lsq and scales keep them"),
        ("llama", GPTQ | {"kind": "codebook"}, "no form for codebook"),
        ("llama", GPTQ | {"scale_start": "mean"}, "would do nothing"),
        ("llama", {"method": "scales", "begin": 0.5}, "leave begin out"),
        ("llama", {"method": "scales", "freeze_after": 0.5}, "leave freeze_after out"),
        ("llama", {"method": "scales", "scale_start": "mean"}, "codes that stay"),
        ("llama", GPTQ | {"samples": 0}, "none to calibrate on"),
        ("llama", {"samples": 64}, "only `start: gptq` reads rows"),
        ("llama", {"start_epochs": 2}, "passes of `start: gptq`"),
        ("llama", GPTQ | {"start_epochs": -1}, "cannot be made"),
        ("llama", GPTQ | {"continuations": -1}, "cannot be written"),
        ("bert", GPTQ | {"continuations": 1}, "go on with a text"),
        ("llama", {"continuations": 1}, "only `start: gptq` reads rows"),
        ("llama", {"skip": ["q_prj"]}, "did you mean 'q_proj'"),
        ("deepseek_v3", {"skip": [r"down_proj\.2$"]}, "some experts of one parameter"),
        ("deepseek_v3", {"bits": 8, "activations": 8}, "stacked experts cannot be rounded"),
    ],
)
def test_what_cannot_work_is_refused_before_training(name: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=message):
        trainer(tiny(name), tmp_path, [QAT(**options)])


def test_activations_that_are_not_finite_have_no_range(tmp_path: Path) -> None:
    model = tiny("llama", **SMALL)
    run = trainer(model, tmp_path, [QAT(8, activations=8, ranges="mse")], max_steps=1)
    model.model.layers[0].input_layernorm.weight.data[0] = torch.inf
    with pytest.raises(CompressError, match=r"have no range[\s\S]*layers.0.self_attn.q_proj"):
        run.train()


def test_a_teacher_under_the_student_is_not_rounded(tmp_path: Path) -> None:
    student = get_peft_model(tiny("llama", **SMALL), LoraConfig(target_modules="all-linear", r=4))
    with pytest.raises(CompressError, match="rounded activations too"):
        trainer(student, tmp_path, [Distillation("base"), QAT(8, activations=8)])


def test_gptq_does_not_round_the_base_of_adapters(tmp_path: Path) -> None:
    student = get_peft_model(tiny("llama", **SMALL), LoraConfig(target_modules="all-linear", r=4))
    with pytest.raises(CompressError, match="round the base of the adapters"):
        trainer(student, tmp_path, [QAT(**GPTQ)])


def test_what_moves_codes_is_refused_where_scales_alone_train(tmp_path: Path) -> None:
    student = get_peft_model(tiny("llama", **SMALL), LoraConfig(target_modules="all-linear", r=4))
    with pytest.raises(CompressError, match="adapters would move"):
        trainer(student, tmp_path, [QAT(method="scales")])
    model = tiny("llama", **SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CompressError, match="prune in a stage before"):
        trainer(model, tmp_path, [QAT(method="scales"), Pruning(0.5)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_no_container_stores_is_said() -> None:
    assert "no container stores powers" in _facts(QAT(kind="powers"))["notes"][0]
    assert "no container stores nf4 with a row" in _facts(QAT(kind="nf4"))["notes"][0]
    assert "unrounded" in _facts(QAT(8, activations=8, ranges="mse"))["notes"][0]
    assert _facts(QAT(8, activations=8))["notes"] == _facts(QAT(kind="nf4", group_size=64))["notes"] == []
    with pytest.raises(CompressError, match="when train"):
        _ = _attached(QAT(4)).scales


def _attached(qat: QAT) -> QAT:
    qat.attach(tiny("llama", **SMALL))
    return qat


def _facts(qat: QAT) -> dict[str, Any]:
    return _attached(qat).facts()


def test_qat_trainer_takes_every_field(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True, save_strategy="no")
    run = QATTrainer(
        tiny("llama", **SMALL),
        bits=3,
        method="lsq",
        begin="0 steps",
        args=args,
        train_dataset=rows(),
        data_collator=collate,
    )
    assert (run.techniques[0].bits, run.techniques[0].method) == (3, "lsq")


def test_an_interrupted_start_keeps_its_blocks_and_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**GPTQ, "continuations": 1}
    whole = trainer(tiny("llama"), tmp_path / "whole", [QAT(**options)], max_steps=1)
    (tmp_path / "whole" / "_qat-start").mkdir(parents=True)
    trainer(tiny("llama"), tmp_path / "whole", [QAT(8)], max_steps=1).train()
    assert (tmp_path / "whole" / "_qat-start").exists()  # of no run that starts from gptq
    whole.train()
    assert not (tmp_path / "whole" / "_qat-start").exists()
    load = InMemory.load
    with pytest.MonkeyPatch.context() as kill:
        kill.setattr(InMemory, "load", lambda self, b: load(self, b) if b < 1 else (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            trainer(tiny("llama"), tmp_path / "killed", [QAT(**options)], max_steps=1).train()
    restore, restored = InMemory.restore, []
    monkeypatch.setattr(InMemory, "restore", lambda self, b: (restored.append(b), restore(self, b))[1])
    monkeypatch.setattr(calibration, "write", lambda *_, **__: pytest.fail("written again"))
    again = trainer(tiny("llama"), tmp_path / "killed", [QAT(**options)], max_steps=1)
    again.train()
    assert restored == [0]
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in again.model.state_dict().items())


@pytest.mark.parametrize("method", ["lsq", "scales"])
def test_an_optimizer_that_is_given_trains_what_techniques_bring(method: str, tmp_path: Path) -> None:
    def run(scheduled: bool) -> CompressionTrainer:
        model = tiny("llama", **SMALL)
        own = torch.optim.SGD(model.parameters(), lr=0.1)
        rate = torch.optim.lr_scheduler.ConstantLR(own) if scheduled else None
        qat = QAT(3, 32, method=method)
        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
        return CompressionTrainer(
            model, techniques=[qat], args=args, train_dataset=rows(), data_collator=collate, optimizers=(own, rate)
        )

    made = run(False)
    begun = {}
    made.add_callback(Begun(made.techniques[0], begun))
    made.train()
    assert any(not torch.equal(scale, begun[name]) for name, scale in made.techniques[0].scales.items())
    with pytest.raises(CompressError, match="the scheduler that was given has no rate for them"):
        run(True).train()


class Begun(TrainerCallback):
    """The scales that a run begins with."""

    def __init__(self, qat: QAT, found: dict[str, torch.Tensor]) -> None:
        self.qat, self.found = qat, found

    def on_step_begin(self, args, state, control, **kwargs):
        for rounding in self.qat._roundings:
            scale, _ = rounding._scale(rounding.parts[0].matrix)
            self.found |= {
                part.name: one.detach().clone()
                for part, one in zip(rounding.parts, scale.chunk(len(rounding.parts)), strict=True)
            }


def test_a_checkpoint_without_its_optimizer_is_not_resumed(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(tiny("llama", **SMALL), tmp_path, [QAT(8)], **settings).train()
    again = trainer(tiny("llama", **SMALL), tmp_path, [QAT(8)], **settings)
    with pytest.raises(CompressError, match="no state of the optimizer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_accelerate_launch_shards_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    run = partial(CompressionTrainer, tiny("llama", **SMALL), args=args, train_dataset=rows(), data_collator=collate)
    monkeypatch.setenv(name, "false")
    run()
    monkeypatch.setenv(name, "true")
    with pytest.raises(CompressError, match="DeepSpeed, FSDP"):
        run()
