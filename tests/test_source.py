"""Models that came quantized: read as the floating weights that their codes stand for, or refused before a weight is
read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_compress import pipeline
from hf_compress.backends import quantize
from hf_compress.errors import CompressError
from hf_compress.oneshot import compress_checkpoint
from hf_compress.oneshot.solvers import solvers
from hf_compress.pipeline import compress
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.source import ModelSource, load_model, load_tokenizer
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import save_tokenizer

IDS = torch.arange(3, 19)[None]
SOURCES = {
    "int8": ("llama", {"backend": "bitsandbytes", "bits": 8}),
    "nf4 of Conv1D": ("gpt2", {"backend": "bitsandbytes", "bits": 4}),
    "experts in 4 bits": ("deepseek_v3", {"backend": "compressed-tensors", "bits": 4, "group_size": 32}),
    "int8 activations": ("bert", {"backend": "compressed-tensors", "bits": 8, "activations": 8}),
    "torchao int8": ("llama", {"backend": "torchao", "bits": 8}),
    "float8 experts": ("qwen3_moe", {"backend": "torchao", "bits": 8, "quant_type": "float8"}),
}


def read(folder: Path, **options: Any) -> PreTrainedModel:
    tokenizer = str(save_tokenizer(folder.parent / "tokenizer"))
    return load_model(ModelSource(id=str(folder), tokenizer=tokenizer, **options))[0]


def recipe(folder: Path, **model: Any) -> Any:
    return parse({"name": "x", "model": {"id": str(folder)} | model, "stages": [{"shrink": {"layers": 0.5}}]})


@pytest.mark.parametrize("name", SOURCES)
def test_a_quantized_model_is_dequantized_when_asked_and_else_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, scheme = SOURCES[name]
    packed = quantize(tiny(family), tmp_path / "packed", **scheme).model
    dense = read(tmp_path / "packed", dequantize=True)
    with torch.no_grad():
        got, want, before = (m(IDS).logits.float() for m in (dense, packed, tiny(family)))
    rounds_inputs = name in ("int8", "int8 activations")
    assert (got - want).norm() <= (0.1 if rounds_inputs else 1e-5) * want.norm()
    assert (got - before).norm() > 1e-3 * before.norm()
    if name == "int8":
        for now, first in zip(weights(dense), weights(tiny(family)), strict=True):
            assert (now.matrix.abs().amax(1) / first.matrix.abs().amax(1) - 1).abs().max() < 2e-3  # fp16 on the way
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(read(tmp_path / "dense")(IDS).logits, got)

    monkeypatch.setattr(pipeline, "load_model", None)
    with pytest.raises(CompressError, match=rf"quantized already \({scheme['backend']}\)[\s\S]*dequantize: true"):
        compress(recipe(tmp_path / "packed"), tmp_path / "out")
    assert [row.kind for row in plan(recipe(tmp_path / "packed", dequantize=True))] == ["source", "shrink"]


def test_what_nothing_here_can_dequantize_is_refused_by_name(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for asked in ({}, {"dequantize": True}):
        with pytest.raises(CompressError, match=r"quantized already \(gptq\)[\s\S]*before it was quantized"):
            plan(recipe(tmp_path / "model", **asked))


def test_widths_that_bitsandbytes_decodes_wrong_are_not_dequantized(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    model = tiny("llama", intermediate_size=160)
    model.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    type(model).from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "packed")
    with pytest.raises(CompressError, match=r"no multiple of 64[\s\S]*layers.0.mlp.down_proj"):
        read(tmp_path / "packed", dequantize=True)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_fp8_blocks_are_read_alike_in_memory_and_block_by_block(name: str, tmp_path: Path) -> None:
    model = tiny(name, intermediate_size=192)  # more than one block of 128 on a side
    model.save_pretrained(tmp_path / "fp8")
    file, expected = tmp_path / "fp8" / "model.safetensors", dict[str, torch.Tensor]()
    tensors = load_file(file)
    for key, tensor in list(tensors.items()):
        if key.endswith("_proj.weight") or "_a_proj_with_mqa" in key:
            out, width = tensor.shape
            rows, columns = torch.arange(out) // 128, torch.arange(width) // 128
            scale = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) + 0.5
            codes = (tensor / scale[rows][:, columns]).to(torch.float8_e4m3fn)
            tensors[key], tensors[f"{key}_scale_inv"] = codes, scale
            expected[key] = codes.float() * scale[rows][:, columns]
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    config["quantization_config"]["activation_scheme"] = "dynamic"
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    assert plan(recipe(tmp_path / "fp8"))[0].bytes < 0.5 * sum(4 * t.numel() for t in tensors.values())

    for other in ([64, 64], None):
        changed = config["quantization_config"] | {"weight_block_size": other}
        other_scales = tmp_path / "other"
        other_scales.mkdir(exist_ok=True)
        (other_scales / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        with pytest.raises(CompressError, match="only 128 x 128 is read here"):
            plan(recipe(other_scales))

    read(tmp_path / "fp8").save_pretrained(tmp_path / "memory")
    compress_checkpoint(
        tmp_path / "fp8", tmp_path / "streamed", [], solvers["criterion"](criterion="magnitude", sparsity=0.1)
    )
    for way in ("memory", "streamed"):
        stored = {k: t for shard in (tmp_path / way).glob("*.safetensors") for k, t in load_file(shard).items()}
        assert "quantization_config" not in json.loads((tmp_path / way / "config.json").read_text())
        assert stored.keys() == {key for key in tensors if not key.endswith("_scale_inv")}
        for key, values in expected.items():
            kept = torch.ones_like(values, dtype=torch.bool) if way == "memory" else stored[key] != 0
            assert kept.float().mean() > 0.8
            assert torch.allclose(stored[key].float()[kept], values[kept], rtol=2**-8), (way, key)


def test_an_unknown_dtype_is_told_from_the_recipe_alone(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(CompressError, match=r"unknown dtype 'bf16'[\s\S]*model.dtype[\s\S]*mean 'bfloat16'"):
        plan(recipe(tmp_path, dtype="bf16", task="causal-lm"))


def test_a_folder_without_a_tokenizer_is_a_model_all_the_same(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    assert load_tokenizer(ModelSource(id=str(tmp_path / "model"))) is None
    made = {"name": "x", "model": {"id": str(tmp_path / "model")}, "stages": [{"quantize": {"bits": 8}}]}
    compress(parse(made), tmp_path / "out")
    assert load_tokenizer(ModelSource(id=str(save_tokenizer(tmp_path / "with")))) is not None
