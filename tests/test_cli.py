"""What a person sees: commands that teach, errors that are short, exit codes a script can use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf_compress import __version__
from hf_compress.cli import main
from tests.models import CONFIGS


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-compress", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    commands = ("run", "plan", "evaluate", "verify", "card", "publish", "compare", "cache-teacher", "env", "list")
    assert [word for word in commands if f"│ {word} " not in said] == []


@pytest.mark.parametrize("module", ["hf_compress", "hf_compress.cli"])
def test_the_module_runs_as_the_command_does(module: str) -> None:
    said = subprocess.run([sys.executable, "-m", module, "list", "stages"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "quantize" in said.stdout


@pytest.mark.parametrize(
    ("what", "holds"),
    [("losses", "forward_kl"), ("criteria", "wanda"), ("backends", "bitsandbytes"), ("families", "deepseek_v3")]
    + [
        ("solvers", "rtn"),
        ("solvers", "act_order (True)"),
        ("losses", "features: 1 - debiased"),
        ("losses", "relation_heads (4)"),
        ("backends", "double_quant"),
        ("criteria", "[H^-1]_jj"),
        ("prune", "budget"),
        ("data", "completion_only"),
        ("publish", "create_pr"),
        ("train", "extra_data"),
        ("stages", "shrink"),
        ("recipes", "quickstart"),
        ("techniques", "QAT"),
        ("alps", "\n    steps: of conjugate gradients."),
        ("gptq", "backend gptq: 2, 3, 4 or 8 bits"),
        ("llama", "family llama: Llama, SmolLM2"),
        ("group_size", "\n quantize: group_size"),
        ("group_size", "\n qat: group_size"),
        ("criterion", "\n prune: criterion"),
        ("criterion", "solver criterion: "),
        ("epochs", "\n solver gptq: epochs  passes over the text"),
        ("damping", "\n backend gptq: damping"),
    ],
)
def test_lists(what: str, holds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "list", what) == 0
    assert holds in capsys.readouterr().out


def test_a_bare_list_names_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "list") == 0
    said = " ".join(capsys.readouterr().out.split())
    names = ("forward_kl", "wanda", "torchao", "deepseek_v3", "alps", "QAT")
    assert [name for name in names if name not in said] == []
    assert "recipes deepseek-v3-8m-from-scratch" in said
    assert "prune-in-training" in said


def test_a_plan_that_would_be_refused_says_so_first_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stage = {"quantize": {"backend": "compressed-tensors", "bits": 4, "group_size": 48}}
    model = {"config": CONFIGS["llama"] | {"model_type": "llama"}, "task": "causal-lm"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "x", "model": model, "stages": [stage]}))
    assert command(monkeypatch, "plan", str(tmp_path / "recipe.yaml")) == 1
    notes = capsys.readouterr().out.partition("  quantize: ")[2]
    assert notes.startswith("will be REFUSED: no matrix would be stored")


def test_plan_of_a_shipped_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "plan", "quickstart") == 0
    assert "distil (train)" in capsys.readouterr().out


def test_mistakes_are_short_and_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(monkeypatch, "run", "quickstrat", "--output", str(tmp_path / "out")) == 1
    assert (
        command(monkeypatch, "run", "quickstart", "--output", str(tmp_path), "--set", "stages.0.args.max_step=1") == 1
    )
    assert command(monkeypatch, "run", "quickstart", "--output", str(tmp_path)) == 1
    assert command(monkeypatch, "verify", str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert all(
        text in said
        for text in (
            "no recipe 'quickstrat'",
            "did you mean 'max_steps'",
            "the output folder exists",
            "no config.json",
        )
    )
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "free space"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "free space"),
        (SafetensorError("Error while deserializing header: incomplete metadata"), "damaged file"),
    ],
)
def test_a_full_disk_or_a_damaged_file_is_a_panel_not_a_traceback(
    error: Exception,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hf_compress.pipeline.compress", fail)
    assert command(monkeypatch, "run", "quickstart", "--output", str(tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_compress.pipeline.compress", interrupt)
    assert command(monkeypatch, "run", "quickstart", "--output", str(tmp_path / "out")) == 130
    said = f"run the same command again to go on (work so far: {tmp_path / '.out.work'})"
    assert said.replace(" ", "") in "".join(capsys.readouterr().err.split())


def test_public_names_are_not_hidden_by_modules_of_the_same_name() -> None:
    import pkgutil

    import hf_compress

    assert __version__
    for module in pkgutil.iter_modules(hf_compress.__path__):
        assert module.name not in hf_compress.__all__, "importing the module would replace the public name"
    for name in hf_compress.__all__:
        assert callable(getattr(hf_compress, name))
        assert getattr(hf_compress, name).__doc__


def test_a_mistyped_folder_is_not_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_compress.hub.fetch", lambda *_, **__: pytest.fail("asked the Hub"))
    assert command(monkeypatch, "verify", "out/smal") == 1
    assert "did you mean 'small'?" in capsys.readouterr().err
