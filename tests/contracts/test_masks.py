"""Contract 3: zeros stay zero, and there are exactly as many as asked for."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import trainer


def check(model, sparsity=0.5) -> None:
    for weight in weights(model):
        assert (weight.matrix == 0).sum() == round(sparsity * weight.matrix.numel()), weight.name


class ZerosAfterEveryStep(TrainerCallback):
    """What a checkpoint written after this step would hold: zeros under the mask, in weights and in moments."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for weight in self.pruning._weights:
            dropped = ~self.pruning._masks[weight.name]
            assert (weight.matrix[dropped] == 0).all(), (weight.name, state.global_step)
            for moment in optimizer.state[weight.whole].values():
                if isinstance(moment, torch.Tensor) and moment.shape == weight.whole.shape:
                    assert (weight.of(moment)[dropped] == 0).all(), weight.name


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt2"])
@pytest.mark.parametrize(
    "args",
    [
        {"optim": "adamw_torch", "weight_decay": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True, "activation_checkpointing": True},
    ],
    ids=["adamw", "sgd", "accumulation", "bf16"],
)
def test_zeros_hold_through_training_and_reload(name: str, args: dict, tmp_path: Path) -> None:
    pruning = Pruning(0.5, every=2, end=0.5)
    run = trainer(tiny(name), tmp_path, [pruning], max_steps=6, **args)
    run.add_callback(ZerosAfterEveryStep(pruning))
    run.train()
    check(run.model)
    run.save_model(str(tmp_path / "saved"))
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


def test_a_pruned_model_keeps_exactly_its_zeros(tmp_path: Path) -> None:
    first = trainer(tiny("llama"), tmp_path, [Pruning(0.5, "2:4", every=1)], max_steps=4)
    first.train()
    before = {w.name: w.matrix == 0 for w in weights(first.model)}
    again = trainer(first.model, tmp_path, [Pruning(0.5, "2:4", schedule="constant"), QAT(4, 32)], max_steps=4)
    again.train()
    for weight in weights(again.model):
        assert (weight.matrix[before[weight.name]] == 0).all()
        assert (weight.matrix.reshape(-1, 4) != 0).sum(1).max() <= 2


def test_masks_are_nested_while_sparsity_grows(tmp_path: Path) -> None:
    pruning = Pruning(0.8, every=1, end=1.0)
    seen = []

    run = trainer(tiny("llama"), tmp_path, [pruning], max_steps=6)
    apply = pruning._apply
    pruning._apply = lambda optimizer: (
        seen.append({k: v.clone() for k, v in pruning._masks.items()}),
        apply(optimizer),
    )[1]
    run.train()
    for earlier, later in pairwise(seen):
        assert all((later[k] <= earlier[k]).all() for k in later)
