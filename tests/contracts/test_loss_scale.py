"""Contract 4: n micro-batches of 1 train as 1 of n does; the order of techniques changes nothing; 1 rank and 2
agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from tests.models import tiny
from tests.training import trainer


def weights_after(name: str, folder: Path, order: int = 1, **args: object) -> dict[str, torch.Tensor]:
    teacher = tiny(name, seed=1, **({} if name == "bert" else {"hidden_size": 128}))
    techniques = [Distillation(teacher, hidden_weight=0.5), Pruning(0.5, schedule="linear", every=1)][::order]
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    run = trainer(
        tiny(name, **changes),
        folder,
        techniques,
        optim="sgd",
        max_grad_norm=0,
        max_steps=2,
        train_sampling_strategy="sequential",
        **args,
    )
    run.train()
    assert all(torch.isfinite(torch.tensor(entry["loss_kl"])) for entry in run.state.log_history if "loss_kl" in entry)
    return {k: v.clone() for k, v in run.model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_accumulation_equals_one_batch(name: str, tmp_path: Path) -> None:
    one = weights_after(name, tmp_path, per_device_train_batch_size=4)
    four = weights_after(name, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(four, one, atol=2e-5, rtol=1e-3)


def test_order_of_techniques_changes_nothing(tmp_path: Path) -> None:
    first, second = (weights_after("llama", tmp_path, order) for order in (1, -1))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    one = weights_after("llama", tmp_path, per_device_train_batch_size=4)
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom tests.contracts.test_loss_scale import weights_after\n"
        "w = weights_after('llama', Path(sys.argv[1]), per_device_train_batch_size=2)\n"
        "import torch.distributed as dist\nassert dist.get_world_size() == 2\n"
        "if dist.get_rank() == 0: torch.save(w, sys.argv[1] + '/two.pt')\ndist.destroy_process_group()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29617",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), one, atol=2e-5, rtol=1e-3)


def test_terms_are_logged_under_their_names(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1))], task_weight=0.5)
    run.train()
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["loss_task"] + entry["loss_kl"], abs=1e-3)
    evaluation = run.evaluate()
    assert {"eval_loss", "eval_kl"} <= set(json.loads(json.dumps(run.state.log_history[-1])))
    assert evaluation["eval_loss"] > 0
