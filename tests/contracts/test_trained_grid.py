"""What QAT trained is what ships: the container answers exactly as the fake-quant model did, through a recipe too,
interrupted or not; a stage that would store anything else is refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_compress.backends import quantize
from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.planning import require_possible
from hf_compress.recipe import parse
from hf_compress.stages import Done, Quantize, Work
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.verification import verify
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import WORDS, save_reviews, save_tokenizer, trainer

IDS = torch.arange(3, 19)[None]
LEARNED, CT = {"method": "lsq"}, {"backend": "compressed-tensors"}
FROM_GPTQ = LEARNED | {"start": "gptq"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "w4 absmax": ("deepseek_v3", {"bits": 4, "group_size": 32}, CT | {"bits": 4, "group_size": 32}),
    "w4": ("llama", LEARNED | {"bits": 4, "group_size": 32}, CT | {"bits": 4, "group_size": 32}),
    "w3 experts": ("qwen3_moe", LEARNED | {"bits": 3, "group_size": 16}, CT | {"bits": 3, "group_size": 16}),
    "w2": ("deepseek_v3", LEARNED | {"bits": 2, "group_size": 32}, CT | {"bits": 2, "group_size": 32}),
    "w4 frozen": ("llama", {"bits": 4, "freeze_after": "1 step"}, CT | {"bits": 4}),
    "w8a8": ("llama", LEARNED | {"bits": 8, "activations": 8}, CT | {"bits": 8, "activations": 8}),
    "w8a8 encoder": ("bert", {"bits": 8, "activations": 8}, CT | {"bits": 8, "activations": 8}),
    "nf4": ("llama", {"kind": "nf4", "group_size": 64}, {"backend": "bitsandbytes", "bits": 4}),
    "w3 from gptq": ("deepseek_v3", FROM_GPTQ | {"bits": 3, "group_size": 32}, CT | {"bits": 3, "group_size": 32}),
    "nf4 from gptq": (
        "llama",
        {"kind": "nf4", "group_size": 64, "start": "gptq"},
        {"backend": "bitsandbytes", "bits": 4},
    ),
    "nf4 learned": ("gpt2", LEARNED | {"kind": "nf4", "group_size": 64}, {"backend": "bitsandbytes", "bits": 4}),
    "w3 scales": (
        "deepseek_v3",
        FROM_GPTQ | {"method": "scales", "bits": 3, "group_size": 32},
        CT | {"bits": 3, "group_size": 32},
    ),
    "nf4 scales": (
        "gpt2",
        {"method": "scales", "kind": "nf4", "group_size": 64},
        {"backend": "bitsandbytes", "bits": 4},
    ),
    "fp4 learned": (
        "llama",
        LEARNED | {"kind": "fp4", "group_size": 64},
        {"backend": "bitsandbytes", "bits": 4, "quant_type": "fp4"},
    ),
}


class Watch(TrainerCallback):
    """What the fake-quant model answers after the last step."""

    def __init__(self, student: torch.nn.Module) -> None:
        self.student = student

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        self.logits = self.student.eval()(IDS).logits
        self.student.train()


def trained(name: str, options: dict[str, Any], folder: Path, dtype: torch.dtype, *more: Any) -> tuple[Any, Any, QAT]:
    model, qat = tiny(name).to(dtype), QAT(**options)
    run = trainer(model, folder, [*more, qat], max_steps=3, learning_rate=1e-3)
    watch = Watch(model)
    run.add_callback(watch)
    run.train()
    return run.model, watch.logits, qat


def test_the_container_answers_as_the_fake_quant_model(tmp_path: Path) -> None:
    for case, (name, options, container) in CASES.items():
        model, logits, qat = trained(name, options, tmp_path / "run", torch.float32)
        own = {} if container["backend"] == "bitsandbytes" else {"scales": qat.scales}
        written = quantize(model, tmp_path / case, **container, **own)
        assert written.coverage.share == 1.0
        with torch.no_grad():
            torch.testing.assert_close(written.model(IDS).logits, logits, atol=1e-5, rtol=1e-5, msg=case)
        stored = load_file(tmp_path / case / "model.safetensors")
        for weight in weights(model) if own else []:
            for key, scale in zip(weight.stored, qat.scales[weight.name].chunk(len(weight.stored)), strict=True):
                assert torch.equal(stored[f"{key}_scale"], scale), (case, key)
    verify(*(tmp_path / case for case in CASES))


@pytest.mark.parametrize("method", ["lsq", "scales"])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_in_bfloat16_are_stored_as_they_were(bits: int, method: str, tmp_path: Path) -> None:
    model, _, qat = trained("llama", {"method": method, "bits": bits}, tmp_path / "run", torch.bfloat16)
    assert {scale.dtype for scale in qat.scales.values()} == {torch.bfloat16}
    written = quantize(model, tmp_path / "out", **CT, bits=bits, scales=qat.scales)
    with torch.no_grad():
        written.model(IDS)  # unpacks the weights (logits differ: .to() took the rotary frequencies to bfloat16 too)
    for weight in weights(model):
        assert torch.equal(written.model.get_parameter(weight.parameter), weight.whole), weight.name


def test_zeros_of_a_mask_reach_the_container(tmp_path: Path) -> None:
    prune = Pruning(0.5, "2:4", schedule="oneshot")
    model, logits, qat = trained("llama", LEARNED | {"bits": 3, "group_size": 32}, tmp_path, torch.float32, prune)
    written = quantize(model, tmp_path / "out", **CT, bits=3, group_size=32, scales=qat.scales)
    with torch.no_grad():
        torch.testing.assert_close(written.model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    for weight in weights(model):
        unpacked = written.model.get_parameter(weight.parameter)
        assert ((unpacked.reshape(-1, 4) != 0).sum(1) <= 2).all()


def recipe(tmp_path: Path, qat: dict[str, Any], quantizing: dict[str, Any], name: str = "llama") -> dict[str, Any]:
    if not (tmp_path / "model").exists():
        tiny(name, vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        save_reviews(tmp_path / "reviews.csv")
    args = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "disable_tqdm": True}
    data = {"id": str(tmp_path / "reviews.csv"), "eval_size": 16, "max_length": 16, "packing": True}
    return {
        "name": "trained-grid",
        "model": {"id": str(tmp_path / "model")},
        "data": data,
        "stages": [
            {"train": {"qat": qat, "distill": {"teacher_model": "dense"}, "args": args}},
            {"quantize": quantizing},
        ],
    }


RECIPES = {
    "learned": (FROM_GPTQ | {"bits": 3, "group_size": 32}, CT | {"bits": 3, "group_size": 32}, "deepseek_v3"),
    "nf4": (
        {"kind": "nf4", "group_size": 64, "method": "lsq"},
        {"backend": "bitsandbytes", "bits": 4, "group_size": 64},
        "llama",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_stores_what_it_trained_after_an_interruption_too(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, *RECIPES[case])
    plain, given = Quantize.run, list[tuple[Any, Any]]()

    def interrupted(self: Quantize, work: Work) -> Done:
        raise KeyboardInterrupt

    def watched(self: Quantize, work: Work) -> Done:
        with torch.no_grad():
            given.append((work.model.eval()(IDS % len(WORDS)).logits, dict(work.scales)))
        return plain(self, work)

    monkeypatch.setattr(Quantize, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(parse(made), tmp_path / "out")
    monkeypatch.setattr(Quantize, "run", watched)
    said: list[str] = []
    compress(parse(made), tmp_path / "out", say=said.append)
    assert "train: done before" in said
    ((logits, scales),) = given
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    disable_cpu_packing(opened)  # its kernel rounds activations
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS % len(WORDS)).logits, logits, atol=1e-5, rtol=1e-5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scale = scales["model.layers.1.self_attn.o_proj.weight"]
    key = "model.layers.1.self_attn.o_proj.weight" + ("_scale" if case == "learned" else ".absmax")
    torch.testing.assert_close(stored[key].flatten(), scale.flatten(), rtol=1e-6, atol=0)


W4 = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("qat", "quantizing", "message"),
    [
        (W4, CT | {"bits": 3, "group_size": 32}, "trained .*'bits': 4.*stores .*'bits': 3"),
        (W4, CT | {"bits": 4}, "trained .*'group_size': 32.*stores .*'group_size': None"),
        (W4, {"backend": "bitsandbytes", "bits": 4}, "trained .*'int'.*stores .*'nf4'"),
        (W4 | {"kind": "powers"}, CT | W4, "trained .*'powers'.*stores .*'int'"),
        ({"bits": 8}, CT | {"bits": 8, "options": {"activations": 8}}, "trained whole activations"),
        ({"bits": 8, "activations": 8}, CT | {"bits": 8}, "computes with whole activations"),
        (
            {"bits": 8, "activations": 8, "ranges": "mse"},
            CT | {"bits": 8, "options": {"activations": 8}},
            "8 bits by mse",
        ),
        ({"bits": 8, "method": "lsq"}, {"backend": "bitsandbytes", "bits": 8}, "finds scales again"),
        ({"bits": 8, "method": "scales"}, {"backend": "bitsandbytes", "bits": 8}, "finds scales again"),
        ({"bits": 8, "freeze_after": 0.5}, {"backend": "bitsandbytes", "bits": 8}, "finds scales again"),
        (
            {"kind": "nf4", "group_size": 64},
            {"backend": "bitsandbytes", "bits": 4, "options": {"double_quant": True}},
            "double_quant rounds",
        ),
        (W4, CT | W4 | {"method": "rtn"}, "rounds anew"),
        (W4, CT | W4 | {"streaming": True}, "finds anew"),
        (W4, CT | W4 | {"overrides": {"q_proj": {"bits": 8}}}, "overrides store"),
        (W4, CT | W4 | {"budget": 3.0}, "a budget stores"),
        (W4, CT | W4 | {"eora": {"rank": 4}}, "eora rounds anew"),
        (W4, CT | W4 | {"smooth": {"method": "awq"}}, "smoothing moves"),
        ({"bits": 8}, {"backend": "torchao", "bits": 8}, "points of its own"),
    ],
)
def test_another_grid_is_refused_before_any_work(
    qat: dict[str, Any], quantizing: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=message):
        parse(recipe(tmp_path, qat, quantizing))


def test_stages_between_and_skipped_weights_are_refused_before_any_work(tmp_path: Path) -> None:
    made = recipe(tmp_path, W4, CT | W4)
    parse(made)
    for harmless in ({"export": {}}, {"cache": {}}):
        parse(made | {"stages": [made["stages"][0], harmless, made["stages"][1]]})
    for between in ({"prune": {}}, {"train": {}}, {"shrink": {"layers": 1}}):
        kind = next(iter(between))
        with pytest.raises(CompressError, match=f"{kind}.* moves the weights off the grid"):
            parse(made | {"stages": [made["stages"][0], between, made["stages"][1]]})
    trained, between, quantized = made["stages"][0], {"prune": {}}, made["stages"][1]
    parse(made | {"stages": [trained, between, trained | {"name": "again"}, quantized]})
    with pytest.raises(CompressError, match="prune moves the weights"):  # the first that does
        parse(made | {"stages": [trained, between, {"shrink": {"layers": 1}}, quantized]})
    skipped = recipe(tmp_path, W4 | {"skip": ["up_proj"]}, CT | W4)
    with pytest.raises(CompressError, match="left 2 weights unrounded that the container rounds"):
        require_possible(parse(skipped))


def test_one_grid_and_what_the_container_leaves_too_are_possible(tmp_path: Path) -> None:
    nf4, stored = {"kind": "nf4", "group_size": 64}, {"backend": "bitsandbytes", "bits": 4}
    require_possible(parse(recipe(tmp_path, nf4, stored)))
    fp4 = {"options": {"quant_type": "fp4"}}
    require_possible(parse(recipe(tmp_path, nf4 | {"kind": "fp4"}, stored | fp4)))
    tiny("llama", vocab_size=len(WORDS), intermediate_size=160).save_pretrained(tmp_path / "model")
    require_possible(parse(recipe(tmp_path, nf4 | {"skip": ["down_proj"]}, stored | {"min_coverage": 0.5})))


def test_a_dtype_that_casts_what_was_trained_is_refused_before_any_work(tmp_path: Path) -> None:
    """bitsandbytes would find every scale anew in it."""
    made = recipe(
        tmp_path,
        {"kind": "nf4", "group_size": 64},
        {"backend": "bitsandbytes", "bits": 4, "options": {"dtype": "bfloat16"}},
    )
    with pytest.raises(CompressError, match=r"options\.dtype casts to bfloat16 what qat trained in float32"):
        require_possible(parse(made))
    made["model"]["dtype"] = "bfloat16"
    require_possible(parse(made))


def test_a_stage_that_trains_scales_alone_has_touched_what_it_rounded(tmp_path: Path) -> None:
    qat = FROM_GPTQ | {"method": "scales", "bits": 3, "group_size": 32, "samples": 8}
    made = recipe(tmp_path, qat, CT | {"bits": 3, "group_size": 32}, "deepseek_v3")
    made["stages"][0]["train"] |= {"freeze": ["."], "task_weight": 0}
    facts = compress(parse(made), tmp_path / "out").facts
    assert [stage["coverage"]["share"] for stage in facts["stages"]] == [1.0, 1.0]
    dense, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", tmp_path / "out"))
    kept = [key for key in dense if key in after]
    assert "model.norm.weight" in kept
    assert all(torch.equal(dense[key], after[key]) for key in kept)
    for beside in ({"lora": {"r": 4}}, {"prune": {"sparsity": 0.5}}):
        with pytest.raises(CompressError, match=r"what trains is W \+ BA|stay as they begin"):
            parse(made | {"stages": [{"train": made["stages"][0]["train"] | beside}]})


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_scales_in_bfloat16_are_what_bitsandbytes_finds(kind: str, tmp_path: Path) -> None:
    options = LEARNED | {"kind": kind, "group_size": 64}
    model, _, _ = trained("llama", options, tmp_path / "run", torch.bfloat16)
    written = quantize(model, tmp_path / "out", bits=4, quant_type=kind, dtype="bfloat16")
    for weight in weights(model):
        layer = written.model.get_submodule(weight.module_name)
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight.whole), weight.name


@pytest.mark.parametrize(
    ("qat", "name", "message"),
    [
        ({"bits": 4, "group_size": 48}, "llama", r"group size 48 does not divide 64 inputs[\s\S]*q_proj"),
        ({"bits": 4, "skip": ["up_prj"]}, "llama", r"no weight matches[\s\S]*up_proj"),
        ({"bits": 8, "activations": 8}, "deepseek_v3", "stacked experts cannot be rounded"),
    ],
)
def test_qat_of_what_the_model_has_not_is_refused_before_any_work(
    qat: dict[str, Any], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=message):
        require_possible(
            parse(recipe(tmp_path, qat, CT | {"bits": qat["bits"]}, name) | {"stages": [{"train": {"qat": qat}}]})
        )
