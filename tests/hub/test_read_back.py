"""What `hf-compress verify user/repo` believes, and what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file

from hf_compress.errors import CompressError
from hf_compress.hub import fetch, publish
from hf_compress.remeasure import remeasure
from tests.hub.conftest import ALICE
from tests.hub.server import Hub

Finished = Callable[..., Path]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(hub: Hub, tmp_path: Path) -> Command:
    """hf-compress as a person runs it, with the test Hub as the Hub."""

    def run(*words: str, token: str = ALICE) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_TOKEN": token} if token else {}
        code = "import sys; sys.argv[0] = 'hf-compress'; from hf_compress.cli import main; main()"
        return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)

    return run


def test_publish_and_verify_as_commands(hub: Hub, finished: Finished, command: Command) -> None:
    folder = str(finished("experts"))
    ran = command("publish", folder, "alice/small", "--private")
    assert ran.returncode == 0, ran.stderr
    assert "published: alice/small, commit" in ran.stdout
    assert hub.repos["alice/small"].private
    assert "nothing to upload" in command("publish", folder, "alice/small", "--private").stdout
    ran = command("verify", "alice/small")
    assert ran.returncode == 0, ran.stderr
    assert "ok: it opens without hf_compress" in ran.stdout
    ran = command("verify", "alice/small", "--revision", "v9")
    assert ran.returncode == 1
    assert "no such revision" in ran.stderr
    for ran in (command("verify", "alice/small", token=""), command("publish", folder, "alice/small", token="")):
        assert ran.returncode == 1
        assert "log in" in ran.stderr or "not logged in" in ran.stderr
        assert "Traceback" not in ran.stderr
        assert ALICE not in ran.stdout + ran.stderr


def test_changed_weights_and_typed_numbers_are_found(
    online: Hub, finished: Finished, command: Command, tmp_path: Path
) -> None:
    publish(finished("decoder"), "alice/small")
    card = online.repos["alice/small"].at("main").files["README.md"].data.decode()
    assert "| times smaller | - | " in card
    typed = card.replace("| times smaller | - | ", "| times smaller | - | 9")
    HfApi().create_commit("alice/small", [CommitOperationAdd("README.md", typed.encode())], commit_message="better")
    ran = command("verify", "alice/small")
    assert ran.returncode == 1
    assert "the card does not say what hf_compress.json says: comparison" in " ".join(ran.stderr.split())
    tensors = load_file(fetch("alice/small") / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    changed = CommitOperationAdd("model.safetensors", tmp_path / "m.safetensors")
    HfApi().create_commit("alice/small", [changed], commit_message="worse")
    ran = command("verify", "alice/small")
    assert ran.returncode == 1
    assert "model.safetensors has changed since it was saved" in " ".join(ran.stderr.split())


def test_numbers_are_measured_again(finished: Finished, made: Callable[[str], Path], tmp_path: Path) -> None:
    folder, dense = finished("experts"), made("experts").parent / "model"
    figures = {(f.artefact, f.name): f for f in remeasure(folder, dense=str(dense))}
    assert {name for _, name in figures} >= {"bytes", "parameters", "perplexity", "kl_to_dense", "agreement"}
    assert all(f.same for f in figures.values())
    assert {f.name for f in remeasure(folder)} == {name for _, name in figures} - {"kl_to_dense", "agreement"}
    path = folder / "hf_compress.json"
    value = figures["root", "perplexity"].card
    path.write_text(path.read_text().replace(str(value), str(value * 0.9)))
    assert not next(f for f in remeasure(folder) if f.name == "perplexity").same


def test_numbers_that_nobody_measured_are_not_measured_again(finished: Finished) -> None:
    folder = finished("experts")
    path = folder / "hf_compress.json"
    path.write_text(path.read_text().replace('"recipe": {', '"recipe": null, "was": {'))
    with pytest.raises(CompressError, match="no number that a recipe measured"):
        remeasure(folder)


def test_folders_with_a_typed_number_are_found_too(finished: Finished, command: Command) -> None:
    folder = finished("experts")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("MB, the dense", "MB, smaller than the dense"))
    ran = command("verify", str(folder))
    assert ran.returncode == 1
    assert "hf_compress.json says: summary" in " ".join(ran.stderr.split())
