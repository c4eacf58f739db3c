"""Environments of their own for libraries that cannot share ours: built from pins that ship with us, found again by a
hash of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_compress.errors import CompressError, did_you_mean
from hf_compress.files import write_whole

Say = Callable[[str], None]

PINS = Path(__file__).with_name("pins.toml")
RECORD = "environment.json"
_SHOWN = ("Collecting ", "Building wheel", "Installing collected", "Uninstalling ")
_CAUSES = (
    (("No space left on device",), "the disk is full", "free space, or set HF_COMPRESS_HOME to a folder elsewhere"),
    (
        ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError"),
        "pip reaches no package index",
        "check the network and pip's own configuration (`pip config list`), then run the same command again",
    ),
    (
        ("gcc' failed", "g++' failed", "cc' failed", "directory: 'gcc'", "directory: 'cc'", "Microsoft Visual C++"),
        "a package is built from source and the compiler failed or is missing",
        "install a C/C++ compiler (Debian: apt-get install build-essential), then run the same command again",
    ),
    (
        ("ensurepip is not available", "No module named ensurepip", "No module named venv"),
        "this Python cannot make virtual environments",
        "install its venv module (Debian: apt-get install python3-venv), then run the same command again",
    ),
)


@dataclass(frozen=True)
class Environment:
    """One table of pins.toml; see the comment there. `pins` are exact."""

    name: str
    summary: str
    megabytes: int
    pins: tuple[str, ...]
    imports: tuple[str, ...]
    tools: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    torch: bool = True

    @property
    def all_pins(self) -> list[str]:
        """With the build of torch that hf_compress itself runs on."""
        return [*([f"torch=={version('torch')}"] if self.torch else []), *self.pins]

    @property
    def folder(self) -> Path:
        """Where it lies once built: other pins, another torch or another Python are another folder."""
        known = [self.all_pins, self.tools, self.options, self.drop, self.variables, sys.version_info[:2]]
        return home() / f"{self.name}-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def built(self) -> bool:
        return (self.folder / RECORD).is_file()

    @property
    def command(self) -> str:
        return f"hf-compress env add {self.name}"

    def require(self, *, what: str, where: str = "") -> Path:
        """Its Python.

        Raises:
            CompressError: it is not built, or only with earlier pins; names the command.
        """
        if not self.built:
            older = sorted(home().glob(f"{self.name}-{'?' * 12}"))
            raise CompressError(
                f"{what} runs in an environment of its own, which "
                + ("was built with other pins, another torch or another Python" if older else "is not there"),
                where=where,
                next_step=self.command,
            )
        return self.python


def home() -> Path:
    """Folder of the environments: HF_COMPRESS_HOME, else hf_compress in the user's cache; ``environments`` in it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_COMPRESS_HOME") or Path(cache) / "hf_compress").absolute() / "environments"


def environments() -> dict[str, Environment]:
    """Name -> environment, of all that ship with us."""
    tables: dict[str, dict[str, Any]] = tomllib.loads(PINS.read_text())

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return tuple(sorted(value.items()))
        return tuple(value) if isinstance(value, list) else value

    return {name: Environment(name, **{k: frozen(v) for k, v in table.items()}) for name, table in tables.items()}


def environment(name: str) -> Environment:
    """Raises a CompressError with the nearest name when there is none of that name."""
    known = environments()
    if name not in known:
        raise CompressError(f"no environment {name!r}", next_step=did_you_mean(name, known))
    return known[name]


def python_for(folder: Path) -> Path:
    """The Python that opens a checkpoint: ours, or that of the environment its container's library lives in.

    Raises:
        CompressError: that environment is not built.
    """
    config = json.loads((folder / "config.json").read_text())
    if (config.get("quantization_config") or {}).get("quant_method") != "gptq" or find_spec("gptqmodel"):
        return Path(sys.executable)
    return environment("gptq").require(what="opening a GPTQ checkpoint", where=str(folder))


def add(name: str, *, say: Say = lambda _: None) -> Path:
    """``add("openvino")``: build the environment unless it is there, and return its Python.

    Built in a hidden sibling and renamed once its libraries import, so what has the final name is whole; a build that
    was interrupted is removed by the next. Two at once: the second waits and finds it done.

    Raises:
        CompressError: unknown name; no room on the disk; what pip or the imports said.
    """
    wanted = environment(name)
    final, part = wanted.folder, wanted.folder.with_name(f".{wanted.folder.name}.part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free // 10**6
    except OSError as error:
        raise CompressError(
            f"cannot write there: {error.strerror}",
            where=str(final.parent),
            next_step="set HF_COMPRESS_HOME to a folder of yours",
        ) from error
    with FileLock(final.parent / f".{final.name}.lock"):
        if wanted.built:
            return wanted.python
        shutil.rmtree(part, ignore_errors=True)
        if free < wanted.megabytes * 1.2:  # pip unpacks and builds beside it
            raise CompressError(
                f"{name} takes about {wanted.megabytes / 1000:.1f} GB and {free / 1000:.1f} GB are free",
                where=str(final.parent),
                next_step="free space, or set HF_COMPRESS_HOME to a folder elsewhere",
            )
        started = time.time()
        try:
            _build(wanted, part, say)
            _point_scripts(part, final)
            megabytes = sum(p.stat().st_size for p in part.rglob("*") if p.is_file() and not p.is_symlink()) // 10**6
            record = {"name": name, "pins": wanted.all_pins, "seconds": round(time.time() - started)}
            write_whole(part / RECORD, json.dumps(record | {"megabytes": megabytes}, indent=2))
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return wanted.python


def _build(wanted: Environment, part: Path, say: Say) -> None:
    say(f"making a virtual environment for {wanted.name}")
    _run(wanted, "venv", [sys.executable, "-m", "venv", str(part)], say)
    python = str(part / wanted.python.relative_to(wanted.folder))
    pip = [python, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    torch = wanted.all_pins[: len(wanted.all_pins) - len(wanted.pins)]
    for packages, options in ((wanted.tools, ()), (torch, ()), ((*torch, *wanted.pins), wanted.options)):
        if packages:
            say("installing " + ", ".join(packages))
            _run(wanted, "pip", [*pip, "install", "--progress-bar", "off", *options, *packages], say)
    if wanted.drop:
        _run(wanted, "pip", [*pip, "uninstall", "--yes", *wanted.drop], say)
    say("importing " + ", ".join(wanted.imports))
    _run(wanted, "import", [python, "-c", "import " + ", ".join(wanted.imports or ("sys",))], say)


def _run(wanted: Environment, step: str, command: list[str], say: Say) -> None:
    """Raise a CompressError with the cause and the last lines of what failed."""
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=clean_environment() | dict(wanted.variables),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if lines[-1].strip().startswith(_SHOWN):
                    say(lines[-1].strip())
            failed = process.wait() != 0
        finally:
            process.kill()
    if failed:
        text = "\n".join(lines)
        causes = [(what, next_step) for marks, what, next_step in _CAUSES if any(mark in text for mark in marks)]
        what, next_step = (*causes, (f"building it failed at: {step}", "mend what its last lines above say"))[0]
        raise CompressError(
            f"{what}\n" + "\n".join(lines[-12:]), where=f"environment {wanted.name}", next_step=next_step
        )


def _point_scripts(part: Path, final: Path) -> None:
    """Console and activation scripts name the folder they were installed in."""
    for script in (part / "Scripts" if os.name == "nt" else part / "bin").iterdir():
        if script.is_file() and not script.is_symlink() and str(part).encode() in (content := script.read_bytes()):
            script.write_bytes(content.replace(str(part).encode(), str(final).encode()))


def clean_environment() -> dict[str, str]:
    """Ours without what would let our modules into another Python."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


@dataclass(frozen=True)
class Found:
    """A built environment on this machine. stale: its pins are no longer ours. record: pins, seconds, megabytes."""

    name: str
    folder: Path
    stale: bool
    record: dict[str, Any]


def found() -> list[Found]:
    """What is built, current and stale."""
    current = {e.folder for e in environments().values()}
    records = sorted(home().glob(f"*/{RECORD}"))
    read = [(path.parent, json.loads(path.read_text())) for path in records]
    return [Found(record["name"], folder, folder not in current, record) for folder, record in read]


def remove(name: str) -> list[Path]:
    """Delete the environment, stale ones of the same name too; the folders that were deleted.

    Raises:
        CompressError: none of that name is there.
    """
    folders = [f.folder for f in found() if f.name == name]
    if not folders:
        raise CompressError(
            f"no environment {name!r} is built", where=str(home()), next_step=_known(f.name for f in found())
        )
    for folder in folders:
        gone = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)  # first, so that an interruption leaves none that looks whole
        shutil.rmtree(gone)
    return folders


def _known(names: Iterable[str]) -> str:
    return "built: " + (", ".join(sorted(set(names))) or "none")
