"""Contracts 1 and 2: every container opens without hf_compress and gives the same answers; what it cannot store is
said, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.backends import backends
from hf_compress.backends.onnx import export_onnx
from hf_compress.errors import CompressError
from hf_compress.fake_quant import Grid, fake_quantize, scales
from hf_compress.verify import verify, write_expectation
from hf_compress.weights import weights
from tests.models import CONFIGS, MOE, tiny

IDS = torch.arange(3, 19)[None]
CASES = [
    ("llama", "bitsandbytes", 8),
    ("bert", "bitsandbytes", 8),
    ("gpt2", "bitsandbytes", 4),
    ("qwen3", "bitsandbytes", 4),
    ("llama", "compressed-tensors", 4),
    ("bert", "compressed-tensors", 8),
    ("deepseek_v3", "compressed-tensors", 4),
    ("deepseek_v2", "compressed-tensors", 8),
    ("qwen3_moe", "compressed-tensors", 4),
    ("qwen2_moe", "compressed-tensors", 4),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    root, made = tmp_path_factory.mktemp("containers"), {}
    for name, backend, bits in CASES:
        model = tiny(name, **({"tie_word_embeddings": True} if name == "llama" else {}))
        with torch.no_grad():
            for weight in weights(model):
                weight.matrix[:, ::2] = 0
        folder = made[name, backend, bits] = root / f"{name}-{backend}-{bits}"
        written = backends[backend](
            model, None, folder, bits=bits, group_size=32 if backend == "compressed-tensors" else None
        )
        assert written.coverage.share == 1.0
        with torch.no_grad():
            error = (written.model(IDS).logits.float() - model(IDS).logits).norm() / model(IDS).logits.norm()
        assert 0 < error < (0.1 if bits == 8 else 0.6), (name, backend, bits)
        write_expectation(written.model, folder)
    return made


def test_every_container_opens_in_a_fresh_process(folders: dict[tuple, Path]) -> None:
    facts = verify(*folders.values())
    assert len(facts) == len(CASES)
    assert all(f["logits_difference"] < 1e-3 for f in facts.values())


def test_damaged_checkpoints_are_found(folders: dict[tuple, Path], tmp_path: Path) -> None:
    source = folders["llama", "compressed-tensors", 4]
    damage = {
        "missing": lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_packed"),
        "changed": lambda t: t.update({"model.norm.weight": -t["model.norm.weight"]}),
    }
    for name, change in damage.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "changed" / "extra.bin").write_bytes(b"")
    with pytest.raises(CompressError) as error:
        verify(tmp_path / "missing", tmp_path / "changed")
    assert "missing: missing_keys" in str(error.value)
    assert "changed: logits differ" in str(error.value)
    assert "pickle files: extra.bin" in str(error.value)


def test_files_are_as_small_as_plan_says(folders: dict[tuple, Path]) -> None:
    for (name, backend, bits), folder in folders.items():
        model = tiny(name, **({"tie_word_embeddings": True} if name == "llama" else {}))
        stores = backends.entry(backend).traits["stores"]
        said = sum(
            stores(w, bits=bits, group_size=32 if backend == "compressed-tensors" else None) for w in weights(model)
        )
        rest = 4 * (sum(p.numel() for p in model.parameters()) - sum(w.shape[0] * w.shape[1] for w in weights(model)))
        tensors = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
        assert tensors == pytest.approx(said + rest, rel=0.02), (name, backend, bits)


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


def test_onnx_file_agrees_and_other_families_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    facts = export_onnx(model, tmp_path)
    assert facts["fp32_error"] < 1e-4
    assert 0 < facts["error"] < 0.2
    model.save_pretrained(tmp_path)
    write_expectation(model, tmp_path)
    assert verify(tmp_path)[str(tmp_path)]["onnx_difference"] < 1e-3
    for name in CONFIGS:
        if name != "bert":
            with pytest.raises(CompressError, match="not supported"):
                export_onnx(tiny(name), tmp_path / name)
