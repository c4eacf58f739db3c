"""torchao: what it stores is what comes back, what it passes over is said, what needs another machine is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from hf_compress.backends import backends, quantize
from hf_compress.blocks import block_profile
from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.planning import require_possible
from hf_compress.recipe import parse
from hf_compress.weights import is_packed, weights
from tests.models import tiny
from tests.training import WORDS, save_reviews, save_tokenizer, trainer

IDS = torch.arange(3, 19)[None]
AO = backends["torchao"]


def test_rows_and_groups_have_scales_of_their_own(tmp_path: Path) -> None:
    for name, group_size in (("rows", None), ("groups", 32)):
        model = tiny("llama")
        wide = model.model.layers[0].mlp.down_proj.weight
        with torch.no_grad():
            wide[0] *= 100
        stored = AO(model, None, tmp_path / name, bits=8, group_size=group_size).model
        back = stored.model.layers[0].mlp.down_proj.weight.dequantize()
        steps = wide.unflatten(1, (-1, group_size or 128)).abs().amax(-1, keepdim=True) / 127
        assert ((back - wide).unflatten(1, (-1, group_size or 128)).abs() <= 0.51 * steps).all()


def test_activations_are_rounded_for_each_token(tmp_path: Path) -> None:
    layer = AO(tiny("llama"), None, tmp_path / "out", bits=8, activations=8).model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100])[None, :, None]
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    rounded = (x / scale).round().clamp(-127, 127) * scale  # torchao's step, which does not reach 128
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, rounded @ layer.weight.dequantize().T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_float8_covers_stacked_experts_and_int8_says_that_it_does_not(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    written = AO(model, None, tmp_path / "float8", bits=8, quant_type="float8")
    assert written.coverage.share == written.coverage.experts == 1.0
    packed = {w.parameter: w.whole for w in weights(written.model)}
    for weight in weights(model):
        back = weight.of(packed[weight.parameter].dequantize())
        top = weight.matrix.abs().amax(1, keepdim=True)
        assert ((back - weight.matrix).abs() <= weight.matrix.abs() / 16 + top * 2**-9 / 448).all(), weight.name
    assert all(entry["bits"] < 9 for entry in block_profile(tmp_path / "float8", "causal-lm", zeros=True))
    written = AO(model, None, tmp_path / "int8", bits=8)
    assert written.coverage.experts == 0.0
    assert any("only float8" in reason for reason in written.coverage.skipped)
    with pytest.raises(CompressError, match="below min_coverage"):
        written.coverage.require(0.99, where="quantize")


def test_blocks_whose_number_begins_alike_are_not_mixed_up(tmp_path: Path) -> None:
    model = tiny("qwen3_moe", num_hidden_layers=12, hidden_size=32, head_dim=16)
    written = AO(model, None, tmp_path / "out", bits=8, quant_type="float8", group_size=16)
    assert written.coverage.share == 1.0


def test_what_torchao_leaves_without_a_word_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_torchao.should_convert_module", lambda name, skip: False)
    with pytest.raises(CompressError, match="without a word"):
        quantize(tiny("llama"), tmp_path / "out", backend="torchao")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_weight_has_no_matrix_to_change(tmp_path: Path) -> None:
    (weight, *_) = weights(AO(tiny("llama"), None, tmp_path / "out", bits=8).model)
    assert is_packed(weight.whole)
    with pytest.raises(CompressError, match="packed by a quantizer"):
        weight.matrix  # noqa: B018


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4}, r"8 bits, not 4[\s\S]*quantize.bits"),
        ({"options": {"quant_type": "int7"}}, r"unknown 8-bit grid 'int7'[\s\S]*options.quant_type"),
        ({"options": {"activations": 4}}, "not 4 bits beside int8 rows"),
        ({"options": {"activations": 8}, "group_size": 32}, "not 8 bits beside int8 groups of 32"),
        ({"options": {"activations": 8, "quant_type": "float8"}}, "float8 activations need a GPU"),
        ({"options": {"quant_types": "int8"}}, "did you mean 'quant_type'"),
        ({"method": "rtn"}, "rounds the whole model at once"),
    ],
)
def test_what_torchao_does_not_have_is_refused_before_a_model_is_read(options: dict, reason: str) -> None:
    with pytest.raises(CompressError, match=reason):
        parse({"name": "x", "model": {"id": "unread"}, "stages": [{"quantize": {"backend": "torchao"} | options}]})


LORA = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"group_size": 32}),
        ("llama", {"quant_type": "float8"}),
        ("deepseek_v3", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # peft, of experts that this model has not
def test_adapters_train_on_packed_weights_as_on_what_they_stand_for(name: str, options: dict, tmp_path: Path) -> None:
    packed = AO(tiny(name), None, tmp_path / "out", bits=8, **options).model
    before = {w.name: is_packed(w.whole) for w in weights(packed)}
    reference, own = tiny(name), dict(packed.named_parameters())
    for key, parameter in reference.named_parameters():
        parameter.data = own[key].dequantize() if is_packed(own[key]) else own[key].data.clone()
    ours = get_peft_model(
        prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False), LoraConfig(**LORA)
    )
    theirs = get_peft_model(reference, LoraConfig(**LORA))
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False)
    gradients = []
    for model in (ours, theirs):
        model.eval()(input_ids=IDS, labels=IDS).loss.backward()
        found = {k: p.grad for k, p in model.named_parameters() if "lora_" in k}
        gradients.append(torch.cat([found[k].flatten() for k in sorted(found)]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()
    merged, wanted = ours.merge_and_unload(), theirs.merge_and_unload()
    assert {w.name: is_packed(w.whole) for w in weights(merged)} == before
    for weight, exact in zip(weights(merged), weights(wanted), strict=True):
        if before[weight.name]:
            step = 1 / 16 if options.get("quant_type") else 0.51 / 127
            off = (weight.whole.dequantize() - exact.matrix).abs()
            assert (off <= step * exact.matrix.abs().amax(1, keepdim=True)).all(), weight.name


def test_rounded_activations_do_not_train(tmp_path: Path) -> None:
    packed = AO(tiny("llama"), None, tmp_path / "out", bits=8, activations=8).model
    student = get_peft_model(packed, LoraConfig(**LORA))
    with pytest.raises(CompressError, match="no gradient back"):
        trainer(student, tmp_path, [])


def stages(*found: dict) -> dict:
    """A recipe of these, and a model that is read from its config alone."""
    return {"name": "x", "stages": list(found), "data": {"id": "unread"}}


@pytest.mark.parametrize(
    ("name", "quantizing", "reason"),
    [
        ("llama", {"backend": "torchao", "options": {"activations": 8}}, "no gradient back"),
        ("qwen3_moe", {"backend": "torchao", "options": {"quant_type": "float8"}}, "stacked experts"),
        ("llama", {"backend": "compressed-tensors"}, "unpack at the first forward"),
        ("llama", {"backend": "torchao"}, ""),
        ("llama", {"backend": "bitsandbytes"}, ""),
    ],
)
def test_containers_on_which_adapters_do_not_train_are_refused_before_any_work(
    name: str, quantizing: dict, reason: str, tmp_path: Path
) -> None:
    tiny(name).config.save_pretrained(tmp_path)
    made = stages({"quantize": quantizing}, {"train": {"lora": {"r": 4}}})
    made["model"] = {"id": str(tmp_path), "task": "causal-lm"}
    if not reason:
        return require_possible(parse(made))
    with pytest.raises(CompressError, match=f"LoRA does not train on {quantizing['backend']}: .*{reason}"):
        require_possible(parse(made))


def test_a_recipe_packs_and_trains_adapters_after_it(tmp_path: Path) -> None:
    tiny("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    data = {"id": str(save_reviews(tmp_path / "r.csv")), "eval_size": 16, "max_length": 16, "packing": True}
    args = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": True}
    made = stages({"quantize": {"backend": "torchao"}}, {"train": {"lora": {"r": 4}, "args": args}})
    facts = compress(parse(made | {"model": {"id": str(tmp_path / "model")}, "data": data}), tmp_path / "out").facts
    assert facts["verify"]["logits_difference"] < 1e-4
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(is_packed(w.whole) for w in weights(opened))
    first = AO(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), None, tmp_path / "plain", bits=8).model
    assert all(
        not torch.equal(a.whole.dequantize(), b.whole.dequantize())
        for a, b in zip(weights(opened), weights(first), strict=True)
    )


def test_importing_it_says_nothing() -> None:
    code = "import hf_compress; from transformers import LlamaForCausalLM; import torchao, torchao.quantization"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
