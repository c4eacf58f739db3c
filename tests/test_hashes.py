"""verify/SHA256SUMS notices every change of what makes up a model, and none of what is made from the facts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hf_compress.errors import CompressError
from hf_compress.verification import HASHES, changed_files, model_files, require_unchanged, write_hashes

MODEL = {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", "onnx/model_quantized.onnx"}
OURS = {"README.md", "recipe.yaml", "hf_compress.json", "plots/losses.png", ".eval_results/hf_compress.yaml"}
SCRATCH = {
    "checkpoint-5/optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "runs/events",
    "hub-step/config.json",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in MODEL | OURS | SCRATCH:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0" * 3_000_000 + name.encode())  # longer than what is read at once
    write_hashes(tmp_path)
    return tmp_path


def test_what_makes_up_a_model(folder: Path) -> None:
    assert set(model_files(folder)) == MODEL
    assert changed_files(folder) == []
    checked = subprocess.run(["sha256sum", "-c", HASHES], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == len(MODEL)


@pytest.mark.parametrize("name", sorted(MODEL))
def test_a_changed_and_a_missing_file(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert changed_files(folder) == [f"{name} has changed since it was saved"]
    (folder / name).unlink()
    with pytest.raises(CompressError, match=f"{name} is missing"):
        require_unchanged(folder)


def test_weights_that_came_later(folder: Path) -> None:
    (folder / "model-2.safetensors").write_text("x")
    assert changed_files(folder) == ["model-2.safetensors was not there when it was saved"]


@pytest.mark.parametrize("name", sorted(OURS | SCRATCH))
def test_what_is_made_again_may_change(name: str, folder: Path) -> None:
    (folder / name).write_text("again")
    require_unchanged(folder)


def test_a_folder_without_hashes_has_none_to_break(folder: Path) -> None:
    (folder / HASHES).unlink()
    assert changed_files(folder) == []
