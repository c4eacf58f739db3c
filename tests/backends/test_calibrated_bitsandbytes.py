"""What a solver rounds to bitsandbytes' own grids is what bitsandbytes stores and decodes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_compress import quantize
from hf_compress.backends import backends, bitsandbytes
from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.errors import CompressError
from hf_compress.grids import FP4, NF4
from hf_compress.oneshot import OneshotReport, compress_blocks, solvers
from hf_compress.weights import weights
from tests.models import tiny
from tests.oneshot.test_oneshot import batches

IDS = torch.arange(5, 21)[None]
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4"},
    "nf4 double": {"bits": 4, "double_quant": True},
    "nf4 double bf16": {"bits": 4, "double_quant": True, "dtype": "bfloat16"},
    "nf4 bf16": {"bits": 4, "dtype": "bfloat16"},
    "int8": {"bits": 8},
}


def calibrated(model: PreTrainedModel, scheme: dict[str, Any]) -> OneshotReport:
    """As the quantize stage does it: only what the container stores is rounded."""
    traits = backends.entry("bitsandbytes").traits
    only = [w.name for w in weights(model) if not isinstance(traits["stores"](w, bits=scheme["bits"]), str)]
    return compress_blocks(model, batches(), solvers["gptq"](grid=traits["grid"](**scheme)), only=only)


def decoded(layer: Any) -> Tensor:
    if layer.weight.dtype == torch.int8:
        found: Tensor = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    else:
        found = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return found


def test_the_tables_are_those_of_bitsandbytes() -> None:
    for kind, table in (("nf4", NF4), ("fp4", FP4)):
        theirs = get_4bit_type(kind, device="cpu").unique()  # FP4 has 0 and -0
        torch.testing.assert_close(torch.tensor(table), theirs, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::hf_compress.backends.PartlyStored")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_bitsandbytes_decodes_to_what_was_chosen(name: str, scheme: str, tmp_path: Path) -> None:
    model = tiny(name)
    report = calibrated(model, SCHEMES[scheme])
    chosen = {w.name: w.matrix.clone() for w in weights(model)}
    written = quantize(model, tmp_path / "out", backend="bitsandbytes", scales=report.scales, **SCHEMES[scheme])
    again = type(model).from_pretrained(tmp_path / "out").eval()
    disable_cpu_packing(again)
    assert report.scales
    for weight in weights(model):
        assert torch.equal(weight.matrix, chosen[weight.name])  # the caller's model is as it was
        if weight.name not in report.scales:
            continue
        found = decoded(again.get_submodule(weight.module_name))
        near = 4e-3 if "bf16" in scheme else 1e-6  # level * scale is rounded to 16 bits there
        torch.testing.assert_close(found, weight.matrix, rtol=0, atol=near * float(weight.matrix.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, written.model(IDS).logits)


@pytest.mark.parametrize("scheme", ["nf4", "nf4 double"])
def test_the_opened_folder_answers_as_the_calibrated_model_and_nearer_to_the_dense_one(
    scheme: str, tmp_path: Path
) -> None:
    dense, model = tiny("llama"), tiny("llama")
    report = calibrated(model, SCHEMES[scheme])
    quantize(model, tmp_path / "ours", backend="bitsandbytes", scales=report.scales, **SCHEMES[scheme])
    quantize(dense, tmp_path / "plain", backend="bitsandbytes", **SCHEMES[scheme])
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("ours", "plain")]
    assert sizes[0] == pytest.approx(sizes[1], abs=20 * 14)  # offsets of double quantization are written as text
    opened = [AutoModelForCausalLM.from_pretrained(tmp_path / d).eval() for d in ("ours", "plain")]
    for each in opened:
        disable_cpu_packing(each)
    rows = torch.cat([batch["input_ids"] for batch in batches()])
    with torch.no_grad():
        ours, plain, inside, wanted = (each(rows).logits for each in (*opened, model, dense))
    torch.testing.assert_close(ours, inside, rtol=1e-4, atol=1e-4)
    assert (ours - wanted).norm() < 0.8 * (plain - wanted).norm()


@pytest.mark.parametrize("scheme", ["nf4", "nf4 double"])
def test_codes_that_would_be_others_are_refused(scheme: str, tmp_path: Path) -> None:
    model = tiny("llama")
    scales = {n: s * 1.5 for n, s in calibrated(model, SCHEMES[scheme]).scales.items()}
    with pytest.raises(CompressError, match="differs from the one that was chosen"):
        quantize(model, tmp_path / "out", backend="bitsandbytes", scales=scales, **SCHEMES[scheme])
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::hf_compress.backends.PartlyStored")
def test_one_call_rounds_with_a_solver_and_writes(tmp_path: Path) -> None:
    by_hand, model = tiny("deepseek_v3"), tiny("deepseek_v3")
    calibrated(by_hand, SCHEMES["nf4"])
    quantize(model, tmp_path / "out", backend="bitsandbytes", bits=4, method="gptq", batches=batches())
    assert all(map(torch.equal, (w.matrix for w in weights(by_hand)), (w.matrix for w in weights(model))))
    for wrong, what in (
        ({"method": "alps"}, "prunes"),
        ({"method": "gtpq"}, "gptq"),
        ({"solver_options": {"x": 1}}, "x"),
    ):
        with pytest.raises(CompressError, match=what):
            quantize(tiny("llama"), tmp_path / "no", bits=4, **({"method": "gptq", "batches": batches()} | wrong))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("scheme", ["nf4", "nf4 double", "int8"])
@pytest.mark.parametrize(("method", "options"), [("rtn", {}), ("gptq", {"epochs": 1})])
def test_groups_of_zeros_are_stored_as_such(method: str, options: dict, scheme: str, tmp_path: Path) -> None:
    """bitsandbytes finds scale 0 there, and double_quant takes the mean of all scales."""
    model = tiny("llama")
    for weight in weights(model):
        weight.matrix.mul_(0.1)[: weight.shape[0] // 4] = 0
    solver = solvers[method](grid=backends.entry("bitsandbytes").traits["grid"](**SCHEMES[scheme]), **options)
    report = compress_blocks(model, batches() if solver.needs else [], solver)
    quantize(model, tmp_path / "out", backend="bitsandbytes", scales=report.scales, **SCHEMES[scheme])
    again = type(model).from_pretrained(tmp_path / "out").eval()
    disable_cpu_packing(again)
    for weight in weights(model):
        found = decoded(again.get_submodule(weight.module_name))
        assert bool((found[: weight.shape[0] // 4] == 0).all())
        assert bool((found[weight.shape[0] // 4 :] != 0).any())


def test_what_is_stored_with_another_scale_holds_it_meanwhile() -> None:
    for scheme in ("nf4", "nf4 double"):
        model = tiny("llama")
        report, before = calibrated(model, SCHEMES[scheme]), {w.name: w.matrix.clone() for w in weights(model)}
        points = backends.entry("bitsandbytes").traits["grid"](**SCHEMES[scheme])
        with bitsandbytes._as_encoded(model, report.scales, points):
            moved = [w.name for w in weights(model) if not torch.equal(w.matrix, before[w.name])]
        assert bool(moved) is (scheme == "nf4 double")
        assert all(torch.equal(w.matrix, before[w.name]) for w in weights(model))
