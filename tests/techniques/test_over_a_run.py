"""What changes over a run: weights of terms, the target of TAID; resumed runs go on where they were."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_compress.errors import CompressError
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.ramp import ramp
from hf_compress.techniques.soft_targets import Objective
from tests.contracts.test_loss_scale import models
from tests.models import tiny
from tests.training import trainer


def test_ramps() -> None:
    assert [ramp(1.0, None, "linear", x) for x in (0, 0.5, 1)] == [1, 1, 1]
    assert [ramp(1.0, 0.2, "linear", x) for x in (0, 0.25, 1)] == pytest.approx([1, 0.8, 0.2])
    assert [ramp(0.0, 2.0, "cosine", x) for x in (0, 1 / 3, 0.5, 1)] == pytest.approx([0, 0.5, 1, 2])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_weights_go_to_their_ends(shape: str, chunked: bool, tmp_path: Path) -> None:
    """With a learning rate of zero and one batch only the weights change what is logged."""
    features = {"hidden_mse": {"weight": 0.0, "weight_end": 2.0}}
    technique = Distillation(
        tiny("llama", seed=1), weight=3.0, weight_end=1.0, weight_schedule=shape, features=features, chunked=chunked
    )
    run = trainer(tiny("llama"), tmp_path, [technique], learning_rate=0.0, per_device_train_batch_size=16)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    done = [i / 3 if shape == "linear" else (1 - math.cos(math.pi * i / 3)) / 2 for i in range(4)]
    distill = [entry["loss_distill"] / logs[0]["loss_distill"] for entry in logs]
    assert distill == pytest.approx([1 - d * 2 / 3 for d in done], rel=1e-3)
    assert [entry["loss_hidden_mse"] / logs[-1]["loss_hidden_mse"] for entry in logs] == pytest.approx(done, abs=1e-3)


def test_a_weight_may_begin_at_zero(tmp_path: Path) -> None:
    technique = Distillation(tiny("llama", seed=1), weight=0.0, weight_end=1.0)
    run = trainer(tiny("llama"), tmp_path, [technique])
    run.train()
    logged = [entry["loss_distill"] for entry in run.state.log_history if "loss" in entry]
    assert logged[0] == 0
    assert all(value > 0 for value in logged[1:])
    student, teacher = models("regression")
    with pytest.raises(CompressError, match="regression head"):
        trainer(student, tmp_path, [Distillation(teacher, weight=0.0, weight_end=1.0)])


def shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float]]:
    """Whether it trains, and the teacher's share, of every objective that is made."""
    seen: list[tuple[bool, float]] = []
    make = Distillation._objective

    def watched(self: Distillation, step: Any, *args: Any) -> Objective:
        found = make(self, step, *args)
        seen.append((step.model.training, found.soft.share))
        return found

    monkeypatch.setattr(Distillation, "_objective", watched)
    return seen


def test_taid_rises_and_evaluates_against_the_teacher_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shares(monkeypatch)
    run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1), taid=0.4)], max_steps=6)
    run.evaluate()
    run.train()
    trained = [share for training, share in seen if training]
    assert trained[0] == 0.4
    assert trained[-1] == 1.0
    assert all(a < b for a, b in pairwise(trained))
    assert {share for training, share in seen if not training} == {1.0}


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


OVER_A_RUN = {
    "taid": {"taid": 0.2, "weight_schedule": "cosine"},
    "weights": {"weight": 2.0, "weight_end": 0.0, "features": {"hidden_mse": {"weight": 0.0, "weight_end": 1.0}}},
    "on-policy": {"lmbda": 0.6},
}


@pytest.mark.parametrize("options", OVER_A_RUN.values(), ids=OVER_A_RUN)
def test_killed_and_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    def begin(folder: str) -> Any:
        technique = Distillation(tiny("llama", seed=1), **options)
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
        return trainer(tiny("llama"), tmp_path / folder, [technique], task_weight=0.0, **settings)

    whole = begin("whole")
    whole.train()
    killed = begin("killed")
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = begin("killed")
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taid": 1.5}, "taid"),
        ({"weight_schedule": "sine"}, "weight_schedule"),
        ({"features": {"cka": {"weight_end": "none"}}}, "no weight"),
        ({"teacher_model": None, "teacher_cache": "folder", "taid": 0.5}, "taid"),
        ({"teacher_model": None, "teacher_cache": "folder", "lmbda": 0.5}, "lmbda"),
        ({"lmbda": 1.5}, "lmbda"),
    ],
)
def test_what_cannot_work_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        Distillation(**({"teacher_model": "folder"} | options)).check()
