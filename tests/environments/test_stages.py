"""A recipe whose library lives elsewhere: refused with the command while it is not there, verified when it is.

The environment is this Python and the worker a stub that writes what the dense model answers; what the real libraries
write is measured in tests/benchmarks/environments.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress import environments as built
from hf_compress import verification
from hf_compress.backends import backends, quantize
from hf_compress.backends import elsewhere as handing
from hf_compress.backends.elsewhere import FORMATS, export_elsewhere
from hf_compress.backends.onnx import export_onnx
from hf_compress.environments import environments, python_for, worker
from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.shippable import shippable
from hf_compress.source import ModelSource
from hf_compress.stages import Export, Work
from hf_compress.verification import verify, write_expectation, write_onnx_expectation
from hf_compress.weights import weights
from tests.models import CONFIGS, tiny

STUB = """
import shutil
from safetensors.torch import load_file, save_file
from job import difference, main, record, require_same, say, serve

def work(job):
    dense = job.tensors["probe.logits"]
    shutil.copytree(job.checkpoint, job.target, dirs_exist_ok=True)
    (job.target / "openvino_model.bin").write_bytes(b"1234")
    (job.target / "openvino_model.xml").write_text("<net/>")
    say(f"{len(job.calibration)} rows, {sum(row['input_ids'].shape[1] for row in job.calibration)} tokens")
    error = require_same(job, dense * SCALE, "the stub")
    save_file({"logits": dense}, job.target / "answers.safetensors")
    got = record(job, dense + RECORDED)
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in NAMES]
    return {"file": "openvino_model.bin", "fp32_error": error, "rounded": names, "kernel_difference": 0.0,
            "reopened_difference": 0.0} | difference(job, got)

def answer(job):
    logits = load_file(job.checkpoint / "answers.safetensors")["logits"]
    return lambda batch: logits

NAMES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
"""  # without transformers, whose import takes seconds


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_COMPRESS_HOME", str(tmp_path / "no-home"))


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every environment is this Python; the workers are STUB with the numbers given."""
    monkeypatch.setattr(built.Environment, "require", lambda *_, **__: Path(sys.executable))
    monkeypatch.setattr(built, "find_spec", lambda _: None)
    scripts = tmp_path / "workers"
    scripts.mkdir()
    for name in ("job.py", "feeds.py"):
        (scripts / name).write_text((worker.WORKERS / name).read_text())
    for module in (worker, handing, sys.modules["hf_compress.backends.gptq"] if "gptq" in backends else worker):
        monkeypatch.setattr(module, "WORKERS", scripts)

    def write(scale: float = 1.0, recorded: float = 0.0) -> None:
        body = STUB.replace("SCALE", str(scale)).replace("RECORDED", str(recorded))
        for name in ("to_openvino", "to_onnx", "to_gptq"):
            (scripts / f"{name}.py").write_text(body + "\nmain(work)\n")
        (scripts / "answer.py").write_text(body + "\nserve(answer)\n")

    write()
    return write


def recipe(*stages: dict[str, Any], config: str = "llama") -> dict[str, Any]:
    model = {"config": CONFIGS[config] | {"model_type": config}, "task": "causal-lm"}
    return {"name": "elsewhere", "model": model, "stages": list(stages)}


STAGES = {
    "gptq": {"quantize": {"backend": "gptq", "bits": 4, "group_size": 32}},
    "openvino": {"export": {"format": "openvino"}},
    "onnx": {"export": {"format": "optimum-onnx"}},
}


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_environment_is_refused_before_a_weight_is_loaded(
    name: str, nothing_built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = parse(recipe(STAGES[name]))
    notes = plan(loaded)[-1].notes
    assert f"needs: hf-compress env add {name}" in notes
    monkeypatch.setattr("hf_compress.pipeline.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(CompressError, match=f"environment of its own[\\s\\S]*hf-compress env add {name}"):
        compress(loaded, tmp_path / "out")


def test_called_without_its_environment_the_backend_names_the_command(nothing_built: None, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="hf-compress env add gptq"):
        quantize(tiny("llama"), tmp_path / "out", backend="gptq", bits=4, group_size=32)
    with pytest.raises(CompressError, match="hf-compress env add openvino"):
        export_elsewhere(tiny("llama"), tmp_path, format="openvino", quantize="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("format", FORMATS)
def test_deepseek_is_refused_by_name(name: str, format: str, stub: Any, tmp_path: Path) -> None:
    notes = plan(parse(recipe({"export": {"format": format}}, config=name)))[-1].notes
    assert any("REFUSED" in note for note in notes)
    with pytest.raises(CompressError, match=r"silently wrong|up to 4\.53"):
        export_elsewhere(tiny(name), tmp_path, format=format, quantize=None)


def test_gptq_covers_no_experts_and_says_so() -> None:
    row = plan(parse(recipe(STAGES["gptq"], config="qwen3_moe")))[-1]
    assert row.experts == 0.0
    assert any("REFUSED" in note and "stacked experts" in note for note in row.notes)


def test_an_export_is_compared_and_opened_again(stub: Any, tmp_path: Path) -> None:
    said: list[str] = []
    ids = torch.full((2, 9), 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    facts = export_elsewhere(
        tiny("llama"),
        tmp_path,
        format="openvino",
        quantize="int8-static",
        calibration=[{"input_ids": ids, "attention_mask": mask}] * 2,
        say=said.append,
    )
    assert "4 rows, 28 tokens" in said
    assert facts["bytes"] == 4
    assert facts["fp32_error"] < 1e-6
    assert facts["reopened_difference"] < 1e-6
    assert json.loads((tmp_path / "openvino" / "export.json").read_text()) == facts
    assert [p.name for p in tmp_path.iterdir() if p.name != "workers"] == ["openvino"]


def test_a_bfloat16_model_is_compared_as_the_worker_opens_it(stub: Any, tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    export_elsewhere(model, tmp_path, format="openvino", quantize=None)
    assert model.dtype == torch.bfloat16
    exact = tiny("llama").bfloat16().float()
    expected = load_file(tmp_path / "openvino" / worker.EXPECTATION)
    asked = {key: expected[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(expected["logits"], exact(**asked).logits)


def test_a_library_that_computes_something_else_is_refused(stub: Any, tmp_path: Path) -> None:
    stub(scale=1.01)
    with pytest.raises(CompressError, match=r"computes something else[\s\S]*do not ship"):
        export_elsewhere(tiny("llama"), tmp_path, format="openvino", quantize=None)
    assert not (tmp_path / "openvino").exists()


def test_a_folder_that_answers_otherwise_when_opened_again_is_refused(stub: Any, tmp_path: Path) -> None:
    stub(recorded=0.5)
    with pytest.raises(CompressError, match="otherwise when opened again"):
        export_elsewhere(tiny("llama"), tmp_path, format="openvino", quantize=None)
    assert not (tmp_path / "openvino").exists()


def test_an_export_that_was_interrupted_when_it_had_its_name_is_made_again(stub: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "source")
    left = tmp_path / "openvino" / "of the run before"
    left.mkdir(parents=True)
    done = Export("openvino").run(Work(ModelSource(str(tmp_path / "source")), "causal-lm", None, None, tmp_path))
    assert (done.extras["openvino"] / "export.json").exists()
    assert not left.exists()


def test_verify_opens_the_copy_in_its_environment(stub: Any, tmp_path: Path) -> None:
    model, folder = tiny("llama"), tmp_path / "out"
    model.save_pretrained(folder)
    write_expectation(model, folder)
    export_elsewhere(model, folder, format="openvino", quantize=None)
    assert verify(folder)[str(folder)]["openvino_difference"] < 1e-6
    recorded = folder / "openvino" / worker.EXPECTATION
    expected = load_file(recorded)
    save_file(expected | {"logits": expected["logits"] * 1.1}, recorded)
    with pytest.raises(CompressError, match="openvino differs"):
        verify(folder)


def test_gptq_is_opened_by_the_environment(stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input_ids": torch.full((2, 9), 7), "attention_mask": torch.ones(2, 9, dtype=torch.long)}]
    written = quantize(tiny("llama"), tmp_path / "out", backend="gptq", bits=4, group_size=32, batches=rows)
    assert written.model is None
    assert written.coverage.share == 1.0
    assert not (tmp_path / "out" / worker.EXPECTATION).exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        verification, "_examined", lambda python, folders, _: {f: ([], {"by": python}) for f in folders}
    )
    monkeypatch.setattr(verification, "changed_files", lambda _: [])
    assert verify(tmp_path / "out")[str(tmp_path / "out")]["by"] == Path(sys.executable)
    monkeypatch.undo()
    monkeypatch.setenv("HF_COMPRESS_HOME", str(tmp_path / "no-home"))
    with pytest.raises(CompressError, match=r"opening a GPTQ checkpoint[\s\S]*hf-compress env add gptq"):
        python_for(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 5}, "2, 3, 4 or 8 bits"), ({"bits": 4, "options": {"damping": 2}}, "damping")]
    + [({"bits": 4, "options": {"calibration": 1}}, "no option 'calibration'")],
)
def test_gptq_options_are_checked_from_the_recipe(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CompressError, match=says):
        parse(recipe({"quantize": {"backend": "gptq"} | options}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "openvin"}, "did you mean 'openvino'"),
        ({"format": "onnx", "quantize": "int4"}, "known: int8, int8-static, none"),
    ],
)
def test_export_options_are_checked_from_the_recipe(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CompressError, match=says):
        parse(recipe({"export": options}))


def test_gptq_says_what_it_cannot_pack() -> None:
    stores = backends.entry("gptq").traits["stores"]
    found = weights(tiny("llama", intermediate_size=80))
    said = {w.name.split(".")[-2]: stores(w, bits=4, group_size=32) for w in found}
    assert said["down_proj"] == "group_size 32 does not divide its 80 inputs"
    assert "32 rows and columns" in said["gate_proj"]
    assert said["q_proj"] == 64 * 64 / 2 + 2 * 64 * (0.5 + 4) + 4 * 64


def test_gptq_leaves_conv1d_alone() -> None:
    stores = backends.entry("gptq").traits["stores"]
    assert all("Conv1D" in stores(w, bits=4, group_size=32) for w in weights(tiny("gpt2")))


def test_raw_constants_of_openvino_may_leave_and_pickles_may_not(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "m.bin").write_bytes(b"\x00\x01\x02\x03")
    with pytest.raises(CompressError, match="pickle"):
        shippable(tmp_path)
    (tmp_path / "openvino" / "m.xml").write_text("<net/>")
    assert "openvino/m.bin" in shippable(tmp_path)
    torch.save({"a": 1}, tmp_path / "openvino" / "m.bin")
    with pytest.raises(CompressError, match="pickle"):
        shippable(tmp_path)


def test_what_ships_names_scripts_that_are_there() -> None:
    for known in FORMATS.values():
        assert known.environment in environments()
        assert (worker.WORKERS / f"to_{known.environment}.py").is_file()
    assert backends.entry("gptq").traits["environment"] in environments()


def test_an_onnx_graph_that_takes_more_than_text_is_fed(tmp_path: Path) -> None:
    """As optimum exports: token types of an encoder, an empty cache and positions of a decoder."""
    from hf_compress.environments.workers.feeds import feeds

    class Input:
        def __init__(self, name: str, shape: list[Any], type: str = "tensor(float)") -> None:
            self.name, self.shape, self.type = name, shape, type

    class Session:
        def get_inputs(self) -> list[Input]:
            cache = Input("past_key_values.0.key", ["batch", 2, "past", 32])
            return [Input("input_ids", []), Input("position_ids", []), Input("token_type_ids", []), cache]

    ids, mask = torch.tensor([[5, 6, 7]]).numpy(), torch.tensor([[1, 1, 0]]).numpy()
    given = feeds(Session(), ids, mask)
    assert given["past_key_values.0.key"].shape == (1, 2, 0, 32)
    assert given["position_ids"].tolist() == [[0, 1, 1]]
    assert given["token_type_ids"].tolist() == [[0, 0, 0]]
    assert "attention_mask" not in given
    Session.get_inputs = lambda self: [Input("pixel_values", [])]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="pixel_values"):
        feeds(Session(), ids, mask)


def test_our_own_onnx_export_still_verifies(tmp_path: Path) -> None:
    model = tiny("bert")
    model.save_pretrained(tmp_path / "out")
    write_expectation(model, tmp_path / "out")
    export_onnx(model, tmp_path / "out")
    write_onnx_expectation(tmp_path / "out")
    assert verify(tmp_path / "out")[str(tmp_path / "out")]["onnx_difference"] < 1e-3
