"""Which files of a folder may leave this machine: nothing that runs, nothing from elsewhere, no secret."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import get_token

from hf_compress.errors import CompressError
from hf_compress.verification import SCRATCH

RUNS = {
    ".bin": "pickle",
    ".pt": "pickle",
    ".pth": "pickle",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".ckpt": "pickle",
    ".joblib": "pickle",
    ".npy": "pickle",
    ".npz": "pickle",
    ".py": "code",
    ".so": "code",
    ".sh": "code",
    ".ipynb": "code",
}
TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja", ".model", ".cfg", ".ini", ".env", ".log", "")
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,})",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s:@\"']+@",
}
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL")


def shippable(folder: Path) -> dict[str, Path]:
    """``shippable(Path("out"))``: path in the repository -> file, everything in the folder but hidden files, a
    Trainer's scratch and half-written ``.part`` files. ``.eval_results/`` goes along.

    Raises:
        CompressError: symbolic links; pickles and code; weights that are not safetensors; a config that asks for
        remote code; tokens, keys and passwords, also the values of this environment's own secret variables. A secret
        is named by its place, never printed.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(SCRATCH):
            continue
        if path.is_symlink():
            raise CompressError(
                "a symbolic link is not published: what it leads to is not part of the folder",
                where=str(path),
                next_step="put the file itself there, or remove the link",
            )
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_dir() or path.suffix == ".part" or (hidden and not fnmatch(name, ".eval_results/*.yaml")):
            continue
        if path.suffix.lower() in RUNS and not _openvino(path):
            raise CompressError(
                f"a {RUNS[path.suffix.lower()]} file can run code on the machine that opens it",
                where=str(path),
                next_step="remove it; weights are published as safetensors, data as JSON or YAML",
            )
        files[name] = path
    _refuse_remote_code(folder)
    _refuse_secrets(files)
    return files


def _openvino(path: Path) -> bool:
    """OpenVINO keeps a graph's constants as raw numbers in a .bin beside its .xml; nothing unpickles that."""
    if path.suffix != ".bin" or path.parent.name != "openvino" or not path.with_suffix(".xml").is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return not start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def _refuse_remote_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if path.is_file() and "auto_map" in json.loads(path.read_text()):
            raise CompressError(
                "the config asks for code of its own (auto_map), which needs trust_remote_code",
                where=str(path),
                next_step="use a model that transformers has a class for, and remove auto_map",
            )


def _refuse_secrets(files: dict[str, Path]) -> None:
    kinds = {kind: re.compile(pattern) for kind, pattern in SECRETS.items()}
    for path in files.values():
        if path.suffix.lower() not in TEXTS:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for kind in [k for k, p in kinds.items() if p.search(line)] + [k for k, v in _own() if v in line]:
                raise CompressError(
                    f"this would publish {kind}",
                    where=f"{path}, line {number}",
                    next_step="take it out of the recipe or file, and make a new one if it was ever shared",
                )


def _own() -> Iterable[tuple[str, str]]:
    """Secrets this process knows: the client's token and environment variables that are named like secrets."""
    token = get_token()
    known = [("your Hub token", token)] if token else []
    known += [(f"the value of ${n}", v) for n, v in os.environ.items() if SECRET_NAMES.search(n.upper())]
    return [(kind, value) for kind, value in known if len(value) >= 12]
