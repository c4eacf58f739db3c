"""What `hf-compress verify user/repo` believes, and what it does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file

from hf_compress.card import differing_sections
from hf_compress.cli import main
from hf_compress.errors import CompressError
from hf_compress.hub import fetch, publish
from hf_compress.remeasure import remeasure
from hf_compress.source import ModelSource, read_config
from tests.hub.conftest import ALICE, BOB
from tests.hub.server import Hub

Finished = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(online: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """hf-compress as a person runs it: exit code, and what was printed, on one line each for output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-compress", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), " ".join(shown.out.split()), " ".join(shown.err.replace("│", "").split())

    return run


def test_publish_and_verify_as_commands(
    hub: Hub, finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(finished("experts"))
    code, out, _ = command("publish", folder, "alice/small", "--private")
    assert code == 0
    assert "published: alice/small, commit" in out
    assert hub.repos["alice/small"].private
    code, out, _ = command("verify", "alice/small")
    assert code == 0
    assert "ok: it opens without hf_compress" in out
    code, _, err = command("verify", "alice/small", "--revision", "v9")
    assert code == 1
    assert "no such revision" in err
    with monkeypatch.context() as quick:
        quick.setattr("hf_compress.hub.verify", lambda f: {str(f): {}})
        assert "nothing to upload" in command("publish", folder, "alice/small", "--private")[1]
    monkeypatch.delenv("HF_TOKEN")
    for words in (("verify", "alice/small", "--revision", "main"), ("publish", folder, "alice/small")):
        code, out, err = command(*words)
        assert code == 1
        assert "hf auth login" in err
        assert "Traceback" not in err
        assert ALICE not in out + err


def test_a_gated_model_says_how_to_get_it(
    trusted: Hub, finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(finished("experts"), "alice/small")
    trusted.repos["alice/small"].gated = True
    for token in (BOB, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        code, _, err = command("verify", "alice/small")
        assert code == 1
        assert "gated: its owner gives access to those who ask" in err
        assert "no such repository" not in err
        with pytest.raises(CompressError, match="the model is gated"):  # as what a recipe starts from
            read_config(ModelSource(id="alice/small"))
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert read_config(ModelSource(id="alice/small")).model_type == "deepseek_v3"


def test_changed_weights_and_typed_numbers_are_found(
    trusted: Hub, finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(finished("decoder"), "alice/small")
    card = trusted.repos["alice/small"].at("main").files["README.md"].data.decode()
    assert "| times smaller | - | " in card
    typed = card.replace("| times smaller | - | ", "| times smaller | - | 9")
    HfApi().create_commit("alice/small", [CommitOperationAdd("README.md", typed.encode())], commit_message="better")
    with monkeypatch.context() as quick:
        quick.setattr("hf_compress.verification.verify", lambda f: {str(f): {}})
        code, _, err = command("verify", "alice/small")
    assert code == 1
    assert "the card does not say what hf_compress.json says: comparison" in err
    tensors = load_file(fetch("alice/small") / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    changed = CommitOperationAdd("model.safetensors", tmp_path / "m.safetensors")
    HfApi().create_commit("alice/small", [changed], commit_message="worse")
    code, _, err = command("verify", "alice/small")
    assert code == 1
    assert "model.safetensors has changed since it was saved" in err


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


def test_a_typed_word_in_a_section_with_numbers_is_found_too(finished: Finished) -> None:
    folder = finished("experts")
    card = (folder / "README.md").read_text()
    assert differing_sections(folder) == []
    (folder / "README.md").write_text(card.replace("MB, the dense", "MB, smaller than the dense") + "\nProse.\n")
    assert differing_sections(folder) == ["summary"]
