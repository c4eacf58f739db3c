"""Contract 5: a run that was killed and resumed ends with the same weights as one that was not."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_compress.errors import CompressError
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.techniques.state import STATE_FILE, load_state
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import trainer


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def run(name: str, folder: Path):
    techniques = [
        Distillation(tiny(name, seed=1, hidden_size=128), features={"hidden_mse": 0.5}),
        Pruning(0.5, every=1),
        QAT(8),
    ]
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


PRUNING = {
    "gradual": {"every": 1},
    "gradients": {"criterion": "taylor", "every": 2, "group": "global"},
    "movement": {"criterion": "movement", "schedule": "linear", "every": 1, "pattern": "2:4"},
    "inputs": {"criterion": "gradient_activation", "every": 2, "budget": "owl"},
    "rewinding": {"schedule": "iterative", "cycles": 3, "begin": "2 steps", "end": "5 steps", "rewind_to": "1 step"},
}


@pytest.mark.parametrize("options", PRUNING.values(), ids=PRUNING)
def test_pruning_resumed_at_any_step_equals_uninterrupted(options: dict, tmp_path: Path) -> None:
    def begin(model):
        settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
        pruning = Pruning(**({"sparsity": 0.5, "end": 0.8} | options))
        return trainer(model, tmp_path, [pruning], **settings, lr_scheduler_type="linear")

    layers = {"num_hidden_layers": 3 if "budget" in options else 2}
    model = tiny("deepseek_v3", **layers)
    for weight in weights(model) if "budget" in options else []:
        weight.matrix.copy_(10 * weight.matrix**3)  # outliers, so that blocks differ
    whole = begin(model)
    whole.train()
    expected = {k: v.clone() for k, v in whole.model.state_dict().items()}
    masks = whole.techniques[0].facts()["masks_sha256"]
    for step in range(1, 7):
        resumed = begin(tiny("deepseek_v3", seed=5, **layers))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.techniques[0].facts()["masks_sha256"] == masks, step
        found = resumed.model.state_dict()
        assert all(torch.equal(found[k], expected[k]) for k in expected), step


def test_adapters_under_a_mask_resume_exactly(tmp_path: Path) -> None:
    def begin():
        student = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", r=4))
        return trainer(student, tmp_path, [Pruning(every=1)], max_steps=5, save_strategy="steps", save_steps=1)

    whole = begin()
    whole.train()
    for step in (2, 4):
        resumed = begin()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found, expected = resumed.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(found[k], expected[k]) for k in expected), step


@pytest.mark.parametrize(
    "features", [{}, {"squarehead": 1.0}, {"hidden_mse": {"layer_map": "last"}}], ids=["none", "others", "fewer"]
)
def test_projections_of_other_features_are_refused(features: dict, tmp_path: Path) -> None:
    def begin(features: dict):
        technique = Distillation(tiny("llama", seed=1, hidden_size=128), features=features)
        return trainer(tiny("llama"), tmp_path, [technique], max_steps=2, save_strategy="steps", save_steps=1)

    begin({"hidden_mse": 0.5}).train()
    with pytest.raises(CompressError, match="of other features"):
        begin(features).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def saved(tmp_path: Path, **options: object) -> tuple[Path, Path]:
    run = trainer(tiny("llama"), tmp_path, [Pruning(every=1, **options)], save_strategy="steps", save_steps=3)
    run.train()
    return tmp_path / "checkpoint-3", tmp_path / "checkpoint-3" / STATE_FILE


def test_masks_are_bits_with_hashes_and_a_changed_bit_is_found(tmp_path: Path) -> None:
    folder, file = saved(tmp_path)
    tensors = load_file(file)
    key = "Pruning/mask model.layers.0.self_attn.q_proj.weight"
    assert (tensors[key].dtype, len(tensors[key])) == (torch.uint8, 64 * 64 // 8)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    tensors[key][5] ^= 1
    save_file(tensors, file, facts)
    with pytest.raises(CompressError, match="not what was written"):
        trainer(tiny("llama"), tmp_path, [Pruning(every=1)]).train(resume_from_checkpoint=str(folder))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CompressError, match="cut off"):
        trainer(tiny("llama"), tmp_path, [Pruning(every=1)]).train(resume_from_checkpoint=str(folder))


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    folder, file = saved(tmp_path / "one")
    other, _ = saved(tmp_path / "two")
    with pytest.raises(CompressError, match="of other weights"):
        trainer(tiny("llama"), tmp_path, [Pruning(skip=["q_proj"])]).train(resume_from_checkpoint=str(folder))
    tiny("llama", seed=9).save_pretrained(other)
    with pytest.raises(CompressError, match="weights that are not zero"):
        trainer(tiny("llama"), tmp_path, [Pruning(every=1)]).train(resume_from_checkpoint=str(other))
    wider = trainer(tiny("llama", intermediate_size=256), tmp_path, [Pruning(every=1)])
    for weight in weights(wider.model):
        weight.matrix.zero_()
    with pytest.raises(CompressError, match=r"bits for 8192 weights, the matrix 16384"):
        load_state(folder, wider.techniques)
    file.unlink()
    with pytest.raises(CompressError, match="holds no state"):
        trainer(tiny("llama"), tmp_path, [Pruning(every=1)]).train(resume_from_checkpoint=str(folder))


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
