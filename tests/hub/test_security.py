"""Nothing that runs, nothing from elsewhere and no secret leaves this machine; hostile text stays text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_compress.errors import CompressError
from hf_compress.hub import fetch, publish
from hf_compress.shippable import shippable
from hf_compress.verification import verify
from tests.hub.conftest import ALICE
from tests.hub.server import Hub

Finished = Callable[..., Path]
SECRET = "hf_" + "Zz9" * 12


def refused(online: Hub, folder: Path, match: str) -> str:
    """The error's text; nothing was sent, not even a name."""
    with pytest.raises(CompressError, match=match) as error:
        publish(folder, "alice/small")
    assert online.log == []
    return str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "extra/optimizer.pt", "a.pkl", "x.npy", "MODEL.PTH"])
def test_pickles(name: str, online: Hub, finished: Finished) -> None:
    folder = finished()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    assert name in refused(online, folder, "pickle")


@pytest.mark.parametrize("name", ["modeling_mine.py", "setup.sh"])
def test_code(name: str, online: Hub, finished: Finished) -> None:
    folder = finished()
    (folder / name).write_text("print(1)")
    assert name in refused(online, folder, "run code")


def test_configs_that_ask_for_code(online: Hub, finished: Finished) -> None:
    folder = finished()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "mine.Model"}}))
    refused(online, folder, "trust_remote_code")


def test_links_and_what_lies_elsewhere(online: Hub, finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.txt").write_text("mine")
    for target in (tmp_path / "elsewhere" / "private.txt", tmp_path / "elsewhere"):
        folder = finished()
        (folder / "link").symlink_to(target)
        refused(online, folder, "symbolic link")
        (folder / "link").unlink()
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()


def test_hashes_cannot_name_files_elsewhere(finished: Finished) -> None:
    folder = finished()
    with (folder / "verify" / "SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  ../../etc/passwd\n" + "0" * 64 + "  /etc/passwd\n")
    with pytest.raises(CompressError, match=r"\.\./\.\./etc/passwd: its record leads out"):
        verify(folder)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("recipe.yaml", f"hub: {SECRET}"),
        ("notes.md", f"use {SECRET} here"),
        ("chat_template.jinja", "AKIA" + "ABCD" * 4),
        ("data.json", '{"url": "https://me:hunter22@host/x"}'),
        ("id", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_secrets_in_files(place: str, text: str, online: Hub, finished: Finished) -> None:
    folder = finished()
    (folder / place).write_text(f"a\n{text}\n")
    said = refused(online, folder, "this would publish")
    assert f"{place}, line 2" in said
    assert SECRET not in said


def test_secrets_in_facts_and_environment(online: Hub, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished()
    facts = json.loads((folder / "hf_compress.json").read_text())
    facts["recipe"]["model"]["id"] = "s3://bucket?key=correct-horse-battery"
    (folder / "hf_compress.json").write_text(json.dumps(facts, indent=2))
    shippable(folder)
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    said = refused(online, folder, r"the value of \$MY_API_KEY")
    assert "correct-horse" not in said
    monkeypatch.delenv("MY_API_KEY")
    facts["recipe"]["model"]["id"] = ALICE[3:]  # not in a token's form, but the client's own all the same
    monkeypatch.setenv("HF_TOKEN", ALICE[3:])
    (folder / "hf_compress.json").write_text(json.dumps(facts, indent=2))
    refused(online, folder, "your Hub token")


def test_the_token_is_nowhere(
    trusted: Hub, finished: Finished, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished()
    with caplog.at_level("DEBUG"):
        publish(folder, "alice/small", say=print)
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    sent = b"".join(blob.data for blob in trusted.repos["alice/small"].at("main").files.values())
    shown = capsys.readouterr()
    for text in (written, sent, (shown.out + shown.err + caplog.text).encode()):
        assert ALICE.encode() not in text


def test_what_comes_down_cannot_run(trusted: Hub, finished: Finished) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    publish(finished(), "alice/small")
    bad = [CommitOperationAdd(name, b"x") for name in ("evil.py", "pytorch_model.bin", "deep/evil.pkl")]
    HfApi().create_commit("alice/small", bad, commit_message="evil")
    there = {p.name for p in fetch("alice/small").rglob("*")}
    assert "model.safetensors" in there
    assert not there & {"evil.py", "pytorch_model.bin", "evil.pkl"}
