"""Environments are whole or not there, found again by their pins, and say what went wrong; without any download."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress import environments as built
from hf_compress.environments import Environment, add, environment, environments, found, home, remove
from hf_compress.errors import CompressError

EMPTY = {"megabytes": 1, "imports": ("json",), "torch": False}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """A known environment without packages, in a home of its own."""
    monkeypatch.setenv("HF_COMPRESS_HOME", str(tmp_path / "home"))
    one = Environment("empty", "nothing", pins=(), **EMPTY)
    monkeypatch.setattr(built, "environments", lambda: {"empty": one})
    run = built._run

    def without_pip(wanted: Environment, step: str, command: list[str], say: built.Say) -> None:
        run(wanted, step, [*command, "--without-pip"] if step == "venv" else command, say)  # pip takes seconds

    monkeypatch.setattr(built, "_run", without_pip)
    return one


def left(room: Path) -> list[str]:
    return sorted(p.name for p in room.iterdir() if p.suffix != ".lock")


def test_built_once_found_again_and_removed(empty: Environment) -> None:
    with pytest.raises(CompressError, match=r"which is not there[\s\S]*hf-compress env add empty"):
        empty.require(what="export")
    said: list[str] = []
    python = add("empty", say=said.append)
    assert said[0] == "making a virtual environment for empty"
    assert python == empty.require(what="export")
    where = [str(python), "-c", "import sys; print(sys.prefix != sys.base_prefix, sys.prefix)"]
    assert subprocess.check_output(where, text=True).split() == ["True", str(empty.folder)]
    stamp = (empty.folder / "environment.json").stat().st_mtime_ns
    assert add("empty") == python
    assert (empty.folder / "environment.json").stat().st_mtime_ns == stamp
    assert [(f.name, f.stale, f.record["pins"]) for f in found()] == [("empty", False, [])]
    assert remove("empty") == [empty.folder]
    assert left(home()) == []
    with pytest.raises(CompressError, match="no environment 'empty' is built"):
        remove("empty")


@pytest.mark.skipif(os.name == "nt", reason="shebang lines")
def test_console_scripts_run_from_the_final_place(empty: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    build = built._build

    def with_a_script(wanted: Environment, part: Path, say: built.Say) -> None:
        build(wanted, part, say)
        (part / "bin" / "tool").write_text(f"#!{part}/bin/python\nimport sys; print(sys.prefix)\n")
        (part / "bin" / "tool").chmod(0o755)

    monkeypatch.setattr(built, "_build", with_a_script)
    add("empty")
    assert subprocess.check_output([empty.folder / "bin" / "tool"], text=True).strip() == str(empty.folder)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing_and_the_next_one_succeeds(
    stop: BaseException, empty: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        (home() / f".{empty.folder.name}.part").mkdir()
        raise stop

    with monkeypatch.context() as during:
        during.setattr(built, "_build", broken)
        with pytest.raises(type(stop) if isinstance(stop, BaseException) else stop):
            add("empty")
    assert left(home()) == []
    assert not empty.built
    (home() / f".{empty.folder.name}.part").mkdir()  # of a build that was killed
    (home() / f".{empty.folder.name}.part" / "half").touch()
    assert not (add("empty").parent.parent / "half").exists()
    assert left(home()) == [empty.folder.name]


def test_other_pins_are_another_environment_and_the_old_one_is_stale(
    empty: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("empty")
    newer = Environment("empty", "nothing", pins=("a==1",), **EMPTY)
    monkeypatch.setattr(built, "environments", lambda: {"empty": newer})
    with pytest.raises(CompressError, match=r"built with other pins[\s\S]*hf-compress env add empty"):
        newer.require(what="export")
    assert [f.stale for f in found()] == [True]
    assert remove("empty") == [empty.folder]


def test_what_does_not_import_is_not_built(empty: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Environment("empty", "nothing", pins=(), **(EMPTY | {"imports": ("no_such_library",)}))
    monkeypatch.setattr(built, "environments", lambda: {"empty": broken})
    with pytest.raises(CompressError, match=r"failed at: import[\s\S]*No module named 'no_such_library'"):
        add("empty")
    assert left(home()) == []


def test_a_full_disk_is_said_before_anything_is_built(empty: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Environment("empty", "nothing", pins=(), **(EMPTY | {"megabytes": 10**12}))
    monkeypatch.setattr(built, "environments", lambda: {"empty": huge})
    monkeypatch.setattr(built, "_build", lambda *_: pytest.fail("it began to build"))
    with pytest.raises(CompressError, match="are free"):
        add("empty")


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Retrying after connection broken by 'NewConnectionError(...)'", "reaches no package index"),
        ("error: command '/usr/bin/gcc' failed: No such file or directory", "compiler"),
        ("The virtual environment was not created: ensurepip is not available", "cannot make virtual environments"),
        ("ERROR: No matching distribution found for a==1", "failed at: pip"),
    ],
)
def test_causes_are_named_with_the_last_lines(said: str, cause: str, empty: Environment) -> None:
    script = f"print('one line before'); print({said!r}); raise SystemExit(1)"
    with pytest.raises(CompressError, match=cause) as error:
        built._run(empty, "pip", [sys.executable, "-c", script], lambda _: None)
    assert said in str(error.value)
    assert error.value.next_step


def test_the_home_is_where_the_variables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_COMPRESS_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "hf_compress" / "environments"
    monkeypatch.setenv("HF_COMPRESS_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine" / "environments"


def test_what_ships_is_pinned_exactly() -> None:
    for one in environments().values():
        assert all("==" in pin for pin in (*one.pins, *one.tools)), one.name
        assert one.all_pins[0].startswith("torch==")
    assert ("BUILD_CUDA_EXT", "0") in environment("gptq").variables
    assert environment("openvino").drop == ("torchvision",)
    with pytest.raises(CompressError, match="did you mean 'openvino'"):
        environment("openvin")


def test_our_modules_do_not_leak_into_it(empty: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    leaks = Environment("empty", "nothing", pins=(), **(EMPTY | {"imports": ("only_here",)}))
    monkeypatch.setattr(built, "environments", lambda: {"empty": leaks})
    with pytest.raises(CompressError, match="No module named 'only_here'"):
        add("empty")
