"""Contract 5: a run that was killed and resumed ends with the same weights as one that was not."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_compress.errors import CompressError
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from tests.models import tiny
from tests.training import trainer


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def run(name: str, folder: Path):
    techniques = [Distillation(tiny(name, seed=1, hidden_size=128), hidden_weight=0.5), Pruning(0.5, every=1), QAT(8)]
    return trainer(tiny(name), folder, techniques, max_steps=5, save_strategy="steps", save_steps=2, weight_decay=0.1)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    whole = run(name, tmp_path / "whole")
    whole.train()
    killed = run(name, tmp_path / "killed")
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = run(name, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_other_techniques_are_refused(tmp_path: Path) -> None:
    first = trainer(tiny("llama"), tmp_path, [Pruning(0.5)], max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    with pytest.raises(CompressError, match="techniques"):
        trainer(tiny("llama"), tmp_path, [QAT(8)], max_steps=2).train(resume_from_checkpoint=True)


def test_best_model_counts_only_after_the_schedule(tmp_path: Path) -> None:
    best = trainer(
        tiny("deepseek_v3"),
        tmp_path,
        [Pruning(0.5, end=0.5, every=1)],
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    best.train()
    assert int(best.state.best_model_checkpoint.rsplit("-", 1)[1]) >= 2
    assert best.techniques[0].facts()["sparsity"] == 0.5
