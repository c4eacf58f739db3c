"""What a container does not have, and what its library is missing for, is said before a weight is read; a model that
it would pack without a word, and wrong, is refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compress import QAT, Pruning, prune
from hf_compress.backends import PartlyStored, quantize
from hf_compress.errors import CompressError
from hf_compress.grids import Grid
from hf_compress.planning import plan, require_possible
from hf_compress.recipe import parse
from hf_compress.weights import weights
from tests.models import tiny


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"backend": "bitsandbytes", "bits": 3}, r"4 or 8 bits, not 3[\s\S]*stages\[0\].quantize.bits"),
        ({"backend": "bitsandbytes", "bits": 4, "group_size": 32}, "its own blocks, not groups of 32"),
        ({"backend": "bitsandbytes", "bits": 8, "group_size": 64}, "int8 has one scale for each row"),
        ({"backend": "bitsandbytes", "bits": 8, "options": {"double_quant": True}}, "int8 has one scale for each row"),
        ({"backend": "bitsandbytes", "bits": 8, "options": {"quant_type": "fp4"}}, "int8 has one scale for each row"),
        ({"backend": "bitsandbytes", "bits": 4, "options": {"quant_type": "nf5"}}, "unknown 4-bit grid 'nf5'"),
        ({"backend": "bitsandbytes", "options": {"dtype": "bf16"}}, r"unknown dtype 'bf16'[\s\S]*mean 'bfloat16'"),
        (
            {"backend": "bitsandbytes", "bits": 4, "options": {"double_quant": "no"}},
            r"boolean \(got 'no'\)[\s\S]*quantize.options.double_quant",
        ),
        ({"backend": "compressed-tensors", "bits": 1}, "2 to 8 bits, not 1"),
        ({"backend": "compressed-tensors", "bits": 9}, "2 to 8 bits, not 9"),
        ({"backend": "compressed-tensors", "bits": 4, "group_size": 48}, "48 does not divide its 64 inputs"),
        ({"backend": "torchao", "bits": 16}, "8 bits, not 16"),
        (
            {"backend": "compressed-tensors", "bits": 4, "group_size": 0},
            r"0 is not positive[\s\S]*quantize.group_size",
        ),
        ({"backend": "compressed-tensors", "bits": 4, "budget": float("nan")}, "budget nan is below the least"),
        ({"backend": "compressed-tensors", "bits": 4, "method": "gptq", "samples": 0}, "0 rows calibrate nothing"),
        (
            {"backend": "compressed-tensors", "bits": 4, "solver_options": {"epochs": 4}},
            r"none is given[\s\S]*quantize.solver_options[\s\S]*method: gptq",
        ),
        ({"backend": "torchao", "group_size": 48}, "48 does not divide its 64 inputs"),
        ({"backend": "torchao", "group_size": 0}, r"0 is not positive[\s\S]*quantize.group_size"),
        ({"backend": "gptq", "bits": 4, "group_size": -32}, r"-32 is not positive[\s\S]*quantize.group_size"),
        ({"backend": "gptq", "bits": 4, "options": {"damping": "x"}}, r"valid number[\s\S]*options.damping"),
    ],
)
def test_bits_and_groups_that_a_container_does_not_have(scheme: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)  # there are no weights to read
    model = {"id": str(tmp_path), "task": "causal-lm"}
    with pytest.raises(CompressError, match=reason):
        require_possible(parse({"name": "x", "model": model, "stages": [{"quantize": scheme}]}))


@pytest.mark.parametrize(
    ("stage", "reads"),
    [
        ({"quantize": {"bits": 4}}, False),
        ({"quantize": {"bits": 4, "method": "hqq"}}, False),
        ({"quantize": {"bits": 4, "method": "gptq"}}, True),
        ({"quantize": {"bits": 4, "backend": "compressed-tensors", "streaming": True, "method": "gptq"}}, True),
        ({"quantize": {"bits": 4, "eora": {"rank": 4}}}, True),
        ({"quantize": {"bits": 4, "smooth": {"method": "awq"}}}, True),
        ({"quantize": {"bits": 4, "backend": "compressed-tensors", "budget": 4.0}}, True),
        ({"quantize": {"bits": 4, "backend": "gptq"}}, True),
        ({"prune": {}}, True),
        ({"prune": {"method": "criterion", "criterion": "magnitude"}}, False),
    ],
)
def test_a_stage_that_calibrates_needs_data_before_a_weight_is_read(
    stage: dict[str, Any], reads: bool, tmp_path: Path
) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    model = {"id": str(tmp_path), "task": "causal-lm"}
    recipe = {"name": "x", "model": model, "stages": [stage]}
    refused = [note for row in plan(parse(recipe)) for note in row.notes if "no data: section" in note]
    assert bool(refused) == reads
    assert not any("no data" in n for row in plan(parse(recipe | {"data": {"id": "unread"}})) for n in row.notes)


PACKED: dict[str, dict[str, Any]] = {
    "int8": {"backend": "bitsandbytes", "bits": 8},
    "nf4": {"backend": "bitsandbytes", "bits": 4},
    "torchao": {"backend": "torchao", "bits": 8},
    "compressed-tensors": {"backend": "compressed-tensors", "bits": 4},
}


@pytest.mark.parametrize("name", PACKED)
def test_weights_that_are_packed_already_or_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    model = tiny("llama")
    packed = quantize(model, tmp_path / "packed", **PACKED[name]).model
    assert packed is not None
    for scheme in PACKED.values():
        with pytest.raises(CompressError, match="quantized already"):
            quantize(packed, tmp_path / "out", **scheme)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(CompressError, match=r"not finite[\s\S]*layers.1.mlp.up_proj.weight"):
        quantize(model, tmp_path / "out", **PACKED[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", ["int8", "compressed-tensors"])
def test_a_quantized_model_is_neither_pruned_nor_trained_as_one_to_be(name: str, ran: bool, tmp_path: Path) -> None:
    """compressed-tensors' layers are whole again after a forward, but for their scales, which look like weights."""
    packed = quantize(tiny("llama"), tmp_path / "packed", **PACKED[name]).model
    assert packed is not None
    ids = torch.arange(3, 19)[None]
    if ran:
        packed(input_ids=ids)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: prune(packed, batches, sparsity=0.5, method="criterion", criterion="magnitude"),
        lambda: Pruning(0.5).attach(packed),
        lambda: QAT(4).attach(packed),
    )
    for attempt in attempts:
        with pytest.raises(CompressError, match=r"quantized already \([\s\S]*before it was quantized"):
            attempt()


def test_scales_that_no_container_could_mean_are_refused(tmp_path: Path) -> None:
    name, out = "model.layers.1.mlp.up_proj.weight", tmp_path / "out"
    given = {name: torch.full((128, 1), torch.nan)}
    for scheme, scales, reason in (
        (PACKED["compressed-tensors"], {name.replace("up", "upp"): given[name]}, "did you mean .*up_proj"),
        (PACKED["torchao"], given, "torchao finds scales of its own"),
        (PACKED["compressed-tensors"], given, "off by nan steps"),
        (
            PACKED["compressed-tensors"],
            {name: torch.full((128, 1), 1e-3)},
            r"rounding explains[\s\S]*not chosen for 4",
        ),
        (PACKED["nf4"], {name: torch.full((128, 1), torch.nan)}, "differs from the one that was chosen by nan"),
    ):
        with pytest.raises(CompressError, match=reason):
            quantize(tiny("llama"), out, scales=scales, **scheme)
        assert not out.exists()


@pytest.mark.parametrize(
    ("stage", "package", "extra"),
    [({"quantize": {"backend": "torchao"}}, "torchao", "torchao"), ({"export": {}}, "onnxruntime", "onnx")],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    stage: dict[str, Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(CompressError, match=rf"'{package}', which is not installed[\s\S]*hf-compress\[{extra}\]"):
        parse({"name": "x", "model": {"id": "unread"}, "stages": [stage]})


CT4: dict[str, Any] = {"backend": "compressed-tensors", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"bits": "4"}, r"'4' is no whole number[\s\S]*where: bits[\s\S]*bits=4, without quotes"),
        ({"bits": 4.5}, r"4.5 is no whole number[\s\S]*where: bits"),
        ({"group_size": "32"}, r"'32' is no whole number[\s\S]*where: group_size"),
        ({"activation": 8}, r"no option 'activation'[\s\S]*where: options[\s\S]*mean 'activations'"),
        ({"activations": "8"}, r"integer \(got '8'\)[\s\S]*where: options.activations"),
        ({"overrides": {"down_proj": {"bits": 8}}}, r"does not take 'overrides'[\s\S]*recipe"),
        ({"budget": 3.5}, r"does not take 'budget'[\s\S]*recipe"),
        ({"method": "gptq", "batches": ["a text"]}, r"dicts with input_ids[\s\S]*tokenizer\(texts"),
        ({"method": "gptq", "batches": {"input_ids": torch.ones(1, 4)}}, "dicts with input_ids"),
        ({"method": "gptq", "batches": [{"input_ids": torch.ones(1, 4)}]}, "and attention_mask"),
        ({"group_size": 48}, r"fewer bits: group_size 48 does not divide its 64 inputs[\s\S]*sizes: 64, 32, 16"),
    ],
)
def test_what_a_script_gets_wrong_is_named_with_the_next_step(
    asked: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=reason):
        quantize(tiny("llama"), tmp_path / "out", **(CT4 | asked))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "stage", "reason"),
    [
        ("llama", {"export": {}}, r"for encoders[\s\S]*optimum-onnx"),
        ("bert", {"quantize": CT4 | {"streaming": True}}, "streaming takes causal language models"),
        ("qwen2", {"quantize": CT4 | {"method": "gptq"}}, "different attention masks"),
        ("qwen2", {"prune": {}}, "different attention masks"),
    ],
)
def test_what_a_stage_cannot_do_for_a_model_is_said_before_a_weight_is_read(
    model_type: str, stage: dict[str, Any], reason: str
) -> None:
    config: dict[str, Any] = {"model_type": model_type, "num_hidden_layers": 4}
    if model_type == "qwen2":
        config |= {"use_sliding_window": True, "max_window_layers": 2}
    task = "text-classification" if model_type == "bert" else "causal-lm"
    recipe = {"name": "x", "model": {"config": config, "task": task}, "data": {"id": "unread"}, "stages": [stage]}
    with pytest.raises(CompressError, match=reason):
        require_possible(parse(recipe))


def test_streaming_says_what_makes_it_read_the_whole_model(tmp_path: Path) -> None:
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    stages = [{"quantize": CT4 | {"streaming": True}}]

    def whole(**more: str) -> list[str]:
        model = {"id": str(tmp_path), "task": "causal-lm"} | more
        return [n for n in plan(parse({"name": "x", "model": model, "stages": stages}))[-1].notes if "read first" in n]

    assert whole() == whole(dtype="bfloat16") == []
    assert "leave model.dtype out to stream" in whole(dtype="float32")[0]
    assert "model.tokenizer asks" in whole(tokenizer=str(tmp_path))[0]


def test_a_solver_rounds_each_weight_to_its_own_grid(tmp_path: Path) -> None:
    model = tiny("llama")
    own = {w.name: Grid(8, 32) for w in weights(model) if "down_proj" in w.name}
    quantize(model, tmp_path / "out", **CT4, method="rtn", grids=own)
    for weight in weights(model):
        levels = len(weight.matrix[0, :32].unique())
        assert (levels > 16) == (weight.name in own)


def test_a_name_in_place_of_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"loaded model is needed, not str[\s\S]*from_pretrained"):
        quantize("my-org/my-model", tmp_path / "out", **CT4)  # type: ignore[arg-type]


def test_scales_of_other_groups_or_beside_a_method_are_refused(tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    scales = {w.name: torch.ones(w.shape[0], w.shape[1] // 32) for w in weights(model)}
    with pytest.raises(CompressError, match=r"2 scales a row, and compressed-tensors stores 1 here[\s\S]*_proj"):
        quantize(model, out, **(CT4 | {"group_size": 64}), scales=scales)
    with pytest.raises(CompressError, match=r"gptq would round them anew[\s\S]*where: method"):
        quantize(model, out, **CT4, scales=scales, method="gptq")


@pytest.mark.parametrize(
    ("budget", "what"),
    [
        (1.5, r"budget 1.5 is below the least[^\n]* 3.00 bits a weight"),
        (5.5, r"budget 5.5 is above [^\n]* 4 bits, 5.00 bits a weight"),
    ],
)
def test_a_budget_without_a_choice_is_answered_in_bits_a_weight(budget: float, what: str, tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    stage = {"quantize": CT4 | {"budget": budget}}
    with pytest.raises(CompressError, match=what):
        require_possible(parse({"name": "x", "model": {"id": str(tmp_path), "task": "causal-lm"}, "stages": [stage]}))


def test_what_stays_as_it_was_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(PartlyStored, match=r"stores 0\.0% .* stacked experts"):
        quantize(tiny("qwen3_moe"), tmp_path / "partly", backend="torchao", bits=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PartlyStored)
        quantize(tiny("llama"), tmp_path / "whole", backend="torchao", bits=8)
