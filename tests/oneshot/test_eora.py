"""The adapter is the best of its rank for what each matrix reads, and plain peft opens it on the quantized model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_compress import quantize
from hf_compress.backends import backends
from hf_compress.errors import CompressError
from hf_compress.oneshot import compress_blocks, solvers
from hf_compress.oneshot.eora import correctable, low_rank_correction, write_adapter
from hf_compress.pipeline import compress
from hf_compress.recipe import parse
from hf_compress.weights import weights
from tests.models import tiny
from tests.oneshot.test_oneshot import batches
from tests.oneshot.test_solvers import correlated, matrix
from tests.training import save_reviews, save_tokenizer


def test_the_loss_is_the_tail_of_the_spectrum_and_no_other_correction_is_better() -> None:
    missing, x = matrix(), correlated()
    hessian = x.T @ x

    def loss(correction: torch.Tensor) -> float:
        return float(((missing - correction).double() @ x.double().T).square().sum())

    for rank in (1, 8, 40):
        b, a, values = low_rank_correction(missing, hessian, rank)
        assert b.shape == (len(missing), rank)
        assert loss(b @ a) == pytest.approx(float(values[rank:].square().sum()), rel=1e-2, abs=1e-2)
        left, size, right = torch.linalg.svd(missing, full_matrices=False)
        if rank < len(size):
            assert loss(b @ a) < 0.9 * loss((left[:, :rank] * size[:rank]) @ right[:rank])
        near = b + 0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(rank))
        assert loss(b @ a) < loss(near @ a)


def test_unrelated_inputs_of_one_size_give_the_plain_decomposition() -> None:
    missing = matrix()
    b, a, values = low_rank_correction(missing, torch.eye(48), 6)
    left, size, right = torch.linalg.svd(missing, full_matrices=False)
    torch.testing.assert_close(b @ a, (left[:, :6] * size[:6]) @ right[:6], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((values / values[0]).float(), size / size[0], rtol=1e-4, atol=1e-5)


def test_a_rank_beyond_the_matrix_gives_all_of_it_back() -> None:
    missing = matrix(8, 48)
    b, a, _ = low_rank_correction(missing, torch.zeros(48, 48), 20)
    torch.testing.assert_close(b @ a, missing, rtol=1e-4, atol=1e-4)
    assert (b[:, 8:] == 0).all()


def recipe(root: Path, **options: Any) -> dict[str, Any]:
    tiny("llama", vocab_size=12).save_pretrained(root / "model")
    save_tokenizer(root / "model")
    data = {"id": str(save_reviews(root / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True}
    how = {"backend": "compressed-tensors", "bits": 3, "samples": 16, "eora": {"rank": 16}} | options
    return {"name": "x", "model": {"id": str(root / "model")}, "data": data, "stages": [{"quantize": how}]}


@pytest.mark.parametrize(
    ("name", "backend", "options", "solving", "nearer"),
    [
        ("deepseek_v3", "compressed-tensors", {"bits": 3, "group_size": 32}, {"method": "hqq"}, 1.0),
        ("llama", "compressed-tensors", {"bits": 2, "group_size": 32}, {"method": "gptq", "epochs": 1}, 0.95),
        ("gpt2", "bitsandbytes", {"bits": 4}, {"method": "hqq"}, 0.75),
    ],
)
def test_peft_opens_it_and_the_quantized_model_is_nearer_to_the_dense_one(
    name: str, backend: str, options: dict[str, Any], solving: dict[str, Any], nearer: float, tmp_path: Path
) -> None:
    model, grid = tiny(name), backends.entry(backend).traits["grid"](**options)
    before = {w.name: w.matrix.clone() for w in weights(model)}
    solver = solvers[solving["method"]](grid=grid, **{key: solving[key] for key in solving.keys() - {"method"}})
    scales = compress_blocks(model, batches() if solver.needs else [], solver).scales
    dense = {weight.name: before[weight.name] for weight in correctable(model, before)}
    left = len(before) - len(dense)
    facts = write_adapter(model, batches(), dense, tmp_path / "adapter", rank=16, left=left)
    plain = [w for w in weights(model) if name != "deepseek_v3" or w.kind == "attention"]
    assert facts["matrices"] == len(plain) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) / 2
    assert sum(facts["skipped"].values()) == len(before) - len(plain)
    assert bool(facts["skipped"]) == (name == "deepseek_v3")
    assert 0 < facts["error_left"] < 0.6
    written = quantize(model, tmp_path / "out", backend=backend, scales=scales, **options)
    rows = torch.cat([batch["input_ids"] for batch in batches()])
    with torch.no_grad():
        dense, rounded = tiny(name)(rows).logits, written.model(rows).logits
        corrected = PeftModel.from_pretrained(written.model, tmp_path / "adapter").eval()(rows).logits
    assert (corrected - dense).norm() < nearer * (rounded - dense).norm()


def test_a_recipe_writes_it_beside_the_checkpoint(tmp_path: Path) -> None:
    facts = compress(parse(recipe(tmp_path, group_size=32)), tmp_path / "out").facts
    told = facts["stages"][0]["facts"]["eora"]
    assert told["rank"] == 16
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out" / "adapter").iterdir())
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(facts["files"])
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 12).repeat(4, 2)[:, :16]
    with torch.no_grad():
        dense, rounded = tiny("llama", vocab_size=12)(ids).logits, quantized(ids).logits
        corrected = PeftModel.from_pretrained(quantized, tmp_path / "out" / "adapter").eval()(ids).logits
    assert (corrected - dense).norm() < 0.75 * (rounded - dense).norm()


def test_what_cannot_be_corrected_is_refused_from_the_recipe_alone(tmp_path: Path) -> None:
    for wrong, what in (
        ({"eora": {"rank": 0}}, "rank 0 is below 1"),
        ({"streaming": True}, "eora needs the whole model in memory"),
    ):
        with pytest.raises(CompressError, match=what):
            parse(recipe(tmp_path, **wrong))
