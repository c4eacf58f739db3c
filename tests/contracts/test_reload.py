"""Contracts 1 and 2 beyond the matrix (test_matrix.py): damage is found, a container stores what was simulated, and
what it cannot store is said or refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.backends import backends, quantize
from hf_compress.backends.onnx import export_onnx
from hf_compress.errors import CompressError
from hf_compress.grids import Grid, fake_quantize, scales
from hf_compress.verification import verify, write_expectation, write_onnx_expectation
from hf_compress.weights import weights
from tests.models import CONFIGS, MOE, tiny

IDS = torch.arange(3, 19)[None]
SCHEMES = {"w4 g32": {"bits": 4, "group_size": 32}, "w8 a8": {"bits": 8, "activations": 8}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("containers")
    for name, scheme in SCHEMES.items():
        written = backends["compressed-tensors"](tiny("llama"), None, root / name, **scheme)
        write_expectation(written.model, root / name)
    return {name: root / name for name in SCHEMES}


def test_damaged_checkpoints_are_found(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["w4 g32"]
    damage = {
        "missing": lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_packed"),
        "changed": lambda t: t.update({"model.norm.weight": -t["model.norm.weight"]}),
    }
    for name, change in damage.items():
        folder = tmp_path / name
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "changed" / "extra.bin").write_bytes(b"")
    with pytest.raises(CompressError) as error:
        verify(tmp_path / "missing", tmp_path / "changed")
    assert "missing: missing_keys" in str(error.value)
    assert "changed: logits differ" in str(error.value)
    assert "pickle files: extra.bin" in str(error.value)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_bitsandbytes_says_that_it_leaves_experts_out(name: str, tmp_path: Path) -> None:
    written = backends["bitsandbytes"](tiny(name), None, tmp_path / "out", bits=8)
    assert written.coverage.experts == 0.0
    assert any("stacked experts" in reason for reason in written.coverage.skipped)
    if name == "deepseek_v3":
        assert any("kv_b_proj" in reason for reason in written.coverage.skipped)
        written.model(IDS)
    with pytest.raises(CompressError, match="below min_coverage"):
        written.coverage.require(0.5, where="quantize")


def test_widths_that_bitsandbytes_decodes_wrong_stay_dense(tmp_path: Path) -> None:
    written = backends["bitsandbytes"](tiny("llama", intermediate_size=160), None, tmp_path / "out", bits=4)
    assert [n for r, names in written.coverage.skipped.items() if "no multiple of 64" in r for n in names] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


@pytest.mark.parametrize("name", MOE)
def test_a_group_that_leaves_an_expert_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="every matrix must be packed"):
        backends["compressed-tensors"](tiny(name), None, tmp_path / "out", bits=4, group_size=48)


def test_the_container_stores_what_qat_simulated(tmp_path: Path) -> None:
    model, grid = tiny("deepseek_v3"), Grid(4, 32)
    with torch.no_grad():
        for weight in weights(model):
            weight.matrix.copy_(fake_quantize(weight.matrix, scales(weight.matrix, grid), grid))
        written = backends["compressed-tensors"](model, None, tmp_path / "out", bits=4, group_size=32)
        torch.testing.assert_close(written.model(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_experts_in_bfloat16_answer_as_recorded(tmp_path: Path) -> None:
    model = tiny("deepseek_v3", n_routed_experts=8, num_hidden_layers=4).to(torch.bfloat16)
    quantize(model, tmp_path / "out", backend="compressed-tensors", bits=4, group_size=32)
    assert verify(str(tmp_path / "out"))[str(tmp_path / "out")]["logits_difference"] == 0.0


def test_weights_that_are_not_finite_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny("llama")
    weights(model)[3].matrix[0, 0] = torch.nan
    with pytest.raises(CompressError, match=weights(model)[3].name):
        quantize(model, tmp_path / "out", backend="compressed-tensors", bits=4, group_size=32)
    assert list(tmp_path.iterdir()) == []


def test_codes_that_do_not_come_back_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors.compressors.pack_quantized import helpers

    pack = helpers.pack_to_int32
    monkeypatch.setattr(helpers, "pack_to_int32", lambda codes, bits: pack(codes.flip(1), bits))
    with pytest.raises(CompressError, match="more than rounding explains"):
        quantize(tiny("llama"), tmp_path / "out", backend="compressed-tensors", bits=4, group_size=32)
    assert list(tmp_path.iterdir()) == []


def test_onnx_file_agrees_and_other_families_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    facts = export_onnx(model, tmp_path)
    assert facts["fp32_error"] < 1e-4
    assert 0 < facts["error"] < 0.3
    model.save_pretrained(tmp_path)
    write_expectation(model, tmp_path)
    write_onnx_expectation(tmp_path)
    assert verify(tmp_path)[str(tmp_path)]["onnx_difference"] < 1e-3
    for name in CONFIGS:
        if name != "bert":
            with pytest.raises(CompressError, match="is for encoders"):
                export_onnx(tiny(name), tmp_path / name)


def test_each_channel_of_the_onnx_file_has_its_own_scale(tmp_path: Path) -> None:
    model = tiny("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.weight.data[0] *= 50  # one large row takes the whole range of a scale that all share
        layer.output.dense.weight.data[:, 0] /= 50
    ours, plain = export_onnx(model, tmp_path / "ours"), export_onnx(model, tmp_path / "plain", plain=True)
    assert ours["error"] < plain["error"] / 2


def test_activations_are_rounded_by_whoever_runs_the_folder(folders: dict[str, Path]) -> None:
    model = tiny("llama")
    opened = type(model).from_pretrained(folders["w8 a8"]).eval()
    layer = opened.model.layers[0].mlp.up_proj
    x = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opened(IDS)  # the model's first forward unpacks its weights
        got = layer(x)
    scale = x.abs().amax(-1, keepdim=True) / 127.5  # the container's symmetric range has 255 steps
    rounded = (x / scale).round().clamp(-128, 127) * scale
    assert torch.allclose(got, rounded @ layer.weight.data.float().T, atol=1e-4)
    assert not torch.allclose(got, x @ layer.weight.data.float().T, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("deepseek_v3", {"bits": 8, "activations": 8}, "stacked experts"),
        ("llama", {"bits": 4, "group_size": 32, "activations": 8}, "8-bit weights"),
        ("deepseek_v3", {"bits": 4, "group_size": 48}, "does not divide"),
        ("llama", {"bits": 1}, "2 to 8 bits"),
        ("gpt2", {"bits": 4}, "Conv1D"),
    ],
)
def test_what_compressed_tensors_cannot_store_is_refused(
    name: str, options: dict, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=reason):
        backends["compressed-tensors"](tiny(name), None, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
