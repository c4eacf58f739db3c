"""A Trainer script's model reaches the Hub with our card, verified, without pickles."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_compress import CompressionTrainer, Distillation, Pruning
from hf_compress.errors import CompressError
from tests.hub.conftest import ALICE
from tests.hub.server import Hub
from tests.models import tiny
from tests.training import WORDS, save_tokenizer, trainer


def made(folder: Path, **args: Any) -> CompressionTrainer:
    return trainer(tiny("llama"), folder, [Distillation(tiny("llama", seed=1)), Pruning(0.5)], **args)


def test_push_after_training(online: Hub, tmp_path: Path) -> None:
    ours = made(tmp_path / "small", eval_strategy="steps", eval_steps=2)
    with pytest.raises(CompressError, match="still at work"):
        ours.push_to_hub()
    assert online.repos == {}  # nothing was made for what is not pushed
    ours.train()
    done = ours.push_to_hub(dataset="stanfordnlp/imdb", license="mit", private=True)
    repo = online.repos["alice/small"]
    files = repo.at("main").files
    assert repo.private
    assert (done.repo, done.commit) == ("alice/small", repo.refs["main"])
    assert len(repo.commits) == 2
    assert not [name for name in files if name.endswith((".bin", ".pt")) or name.startswith("checkpoint")]
    card = files["README.md"].data.decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["datasets"] == ["stanfordnlp/imdb"]
    assert front["tags"] == ["hf-compress", "train"]
    assert "CompressionTrainer" in card
    assert "max_steps: 4" in card
    assert "eval_loss" in card
    assert "Zeros from pruning make no file smaller" in card
    facts = json.loads(files["hf_compress.json"].data)
    assert facts["verify"]["logits_difference"] < 1e-3
    assert facts["stages"][0]["facts"]["techniques"]["Pruning"]["sparsity"] == 0.5
    assert {round(b["zeros"], 2) for b in facts["blocks"]} == {0.5}
    assert all(ALICE.encode() not in blob.data and b"/tmp/" not in blob.data for blob in files.values())
    model = AutoModelForCausalLM.from_pretrained("alice/small")
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.4


def test_push_while_training_and_at_its_end(trusted: Hub, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "hub_model_id": "alice/mine", "hub_always_push": True}
    ours = made(tmp_path / "out", push_to_hub=True, hub_strategy="every_save", **saves)
    save_tokenizer(tmp_path / "tok", WORDS)
    ours.train()
    ours.push_to_hub()
    history = trusted.repos["alice/mine"].history("main")
    said = [commit.message for commit in history]
    assert said == [
        "End of training",
        "Training in progress, step 4",
        "Training in progress, step 2",
        "initial commit",
    ]
    assert b"Training goes on: this is step 2" in history[2].files["README.md"].data
    assert json.loads(history[2].files["hf_compress.json"].data)["verify"] is None  # nobody opened a step
    assert b"Training goes on" not in history[0].files["README.md"].data
    assert not [name for name in history[1].files if name.endswith((".bin", ".pt", ".pth"))]
    assert "verify/expectation.safetensors" in history[0].files


def test_to_a_branch_in_the_background(trusted: Hub, tmp_path: Path) -> None:
    ours = made(tmp_path / "out", hub_model_id="alice/mine", hub_private_repo=True, hub_revision="dev")
    ours.train()
    done = ours.push_to_hub("By night", blocking=False).result()
    repo = trusted.repos["alice/mine"]
    assert repo.private
    assert repo.refs["dev"] == done.commit
    assert repo.at("dev").message == "By night"
    assert set(repo.at("main").files) == {".gitattributes"}
    facts = json.loads(repo.at("dev").files["hf_compress.json"].data)
    assert facts["name"] == "mine"
    assert facts["in_progress"] is None
    ours.push_to_hub(revision="other")
    assert repo.refs["other"] != repo.refs["main"]


@pytest.mark.parametrize(
    ("strategy", "always", "pushed"),
    [("every_save", False, []), ("every_save", True, ["waited", "step"]), ("end", True, [])],
)
def test_a_push_under_way_is_waited_for_or_left_to_the_next(
    strategy: str, always: bool, pushed: list[str], online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = made(tmp_path / "out", push_to_hub=True, hub_strategy=strategy, hub_always_push=always)
    seen: list[str] = []
    running = SimpleNamespace(is_done=lambda: False, wait_until_done=lambda: seen.append("waited"))
    ours.push_in_progress = running
    monkeypatch.setattr("hf_compress.trainer_push.push_step", lambda *_: seen.append("step"))
    ours._push_from_checkpoint(str(tmp_path))
    assert seen == pushed
    ours.is_world_process_zero = lambda: False  # type: ignore[method-assign]
    ours._push_from_checkpoint(str(tmp_path))
    assert seen == pushed


def test_adapters_alone_and_other_ranks(online: Hub, tmp_path: Path) -> None:
    ours = made(tmp_path / "out", max_steps=1)
    ours.train()
    ours.model.peft_config = {}
    with pytest.raises(CompressError, match="adapters alone"):
        ours.push_to_hub()
    with pytest.raises(CompressError, match="adapters alone"):
        ours.create_model_card()
    del ours.model.peft_config
    ours.is_world_process_zero = lambda: False  # type: ignore[method-assign]
    ours.create_model_card()
    assert ours.push_to_hub() is None
    assert online.repos == {}
    assert not (tmp_path / "out" / "README.md").exists()


def test_tokens_and_optimizers_stay(tmp_path: Path, online: Hub) -> None:
    with pytest.raises(CompressError, match="ends up in files and logs"):
        made(tmp_path / "a", hub_token="hf_x")
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(CompressError, match="optimizer's state is a pickle"):
            made(tmp_path / "a", push_to_hub=True, hub_strategy=strategy)
    ours = made(tmp_path / "a")
    with pytest.raises(CompressError, match="not passed around"):
        ours.push_to_hub(token="hf_x")
    assert online.repos == {}


def test_a_trainers_own_card_is_ours(tmp_path: Path) -> None:
    ours = made(tmp_path / "out")
    ours.train()
    ours.save_model()
    ours.create_model_card(model_name="mine", tags=["x"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# mine" in card
    assert "compressed with hf_compress" in card
    assert isinstance(ours.args, TrainingArguments)
