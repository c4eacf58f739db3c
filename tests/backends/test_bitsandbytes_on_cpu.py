"""bitsandbytes on a CPU: training (QLoRA), evaluating, saving, reloading and training again is, at every step, what
plain layers with the same weights do; nothing repacks 4-bit weights in place, on CPUs whose bitsandbytes would."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback

from hf_compress import evaluation
from hf_compress.backends import backends, quantize
from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.data import Data
from hf_compress.errors import CompressError
from hf_compress.evaluation.artefacts import open_folder
from hf_compress.source import ModelSource, load_model
from hf_compress.techniques.distillation import Distillation
from hf_compress.verification import verify
from tests.models import tiny
from tests.training import WORDS, save_reviews, save_tokenizer, trainer

SCHEMES = {
    "int8": {"bits": 8},
    "nf4": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4"},
    "nf4 double": {"bits": 4, "double_quant": True},
}
IDS = torch.arange(3, 19)[None]


@pytest.fixture
def repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX512-BF16, as far as bitsandbytes' layers know; where one repacks its weight, the test fails."""

    def repack(*_: object) -> None:
        raise AssertionError("a 4-bit weight was repacked in place")

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", repack)


def read(folder: Path) -> PreTrainedModel:
    """As a stage reads it."""
    tokenizer = save_tokenizer(folder.parent / "tokenizer")
    return load_model(ModelSource(id=str(folder), tokenizer=str(tokenizer)))[0]


class Plain(nn.Linear):
    """What a packed layer stands for: its decoded weight. LLM.int8() also rounds inputs outside training
    (https://arxiv.org/abs/2208.07339): 127 steps for each token, columns with an input of 6 and more left out."""

    codes: Tensor | None = None

    @staticmethod
    def of(layer: nn.Module) -> "Plain":
        made = Plain(layer.in_features, layer.out_features, bias=layer.bias is not None)
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            made.codes, made.tops = layer.weight.CB.float(), layer.weight.SCB.float()
            weight = made.codes * made.tops[:, None] / 127
        else:
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        made.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.codes is None or self.training:
            return super().forward(x)
        rows = x.flatten(0, -2)
        half = rows.half()
        large = half.abs() >= 6
        columns = large.any(0)
        half = half.masked_fill(large, 0)
        top = half.abs().amax(1).float()
        steps = (half * (127 / top[:, None])).round().nan_to_num(0)  # rows of zeros
        steps[:, columns] = 0
        # in its order and with its 1 / 127^2: a last bit here turns a rounding in the next layer
        out = steps @ self.codes.T * (top[:, None] * self.tops) * 6.200124e-05
        out = out if self.bias is None else out + self.bias
        large_part = self.codes[:, columns] * self.tops[:, None] * (1 / 127)
        return out.addmm(rows[:, columns], large_part.T).unflatten(0, x.shape[:-1])


def plain(packed: PreTrainedModel) -> PreTrainedModel:
    """The reference path: the same model of plain layers."""
    made = tiny(packed.config.model_type)
    own = {name: p for name, p in packed.named_parameters() if p.is_floating_point()}
    for name, parameter in made.named_parameters():
        if name in own and own[name].shape == parameter.shape:
            parameter.data = own[name].data.clone()
    for name, layer in packed.named_modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            made.set_submodule(name, Plain.of(layer))
    return made


class Watch(TrainerCallback):
    """Gradients of every step, and its loss and that of the evaluation after it, in turns."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(found).clone())

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs[key] for key in ("loss", "eval_loss") if key in logs]


def run(model: nn.Module, folder: Path) -> Watch:
    watch = Watch()
    loop = trainer(model, folder, [], max_steps=3, eval_strategy="steps", eval_steps=1, bf16=False)
    loop.add_callback(watch)
    loop.train()
    assert len(watch.gradients) == 3
    assert len(watch.losses) == 6
    return watch


def same(ours: Watch, reference: Watch, *, evaluated: float) -> None:
    assert ours.losses[::2] == pytest.approx(reference.losses[::2], rel=1e-5)
    assert ours.losses[1::2] == pytest.approx(reference.losses[1::2], rel=evaluated)
    for step, (a, b) in enumerate(zip(ours.gradients, reference.gradients, strict=True)):
        assert (a - b).norm() <= 1e-4 * b.norm(), f"step {step}"


@pytest.mark.usefixtures("repacking")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_evaluating_saving_and_training_again_is_the_reference_path(scheme: str, tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=True)
    quantize(tiny("llama"), tmp_path / "one", **SCHEMES[scheme])
    packed = read(tmp_path / "one")
    reference = get_peft_model(plain(packed).eval(), adapters)
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS).logits, reference(IDS).logits, atol=1e-4, rtol=1e-4)
    ours = get_peft_model(prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False), adapters)
    ours.load_state_dict({k: v for k, v in reference.state_dict().items() if "lora_" in k}, strict=False)
    # in evaluation int8 rounds activations: which way one in the middle goes is decided by a CPU's order of adding
    evaluated = 1e-4 if scheme == "int8" else 1e-5
    same(run(ours, tmp_path / "a"), run(reference, tmp_path / "b"), evaluated=evaluated)

    ours.save_pretrained(tmp_path / "adapters")
    ours.unload().save_pretrained(tmp_path / "two")  # after training and evaluation
    packed = read(tmp_path / "two")
    before = read(tmp_path / "one")
    for (name, saved), first in zip(packed.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(saved, first), name
    packed = prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
    ours = PeftModel.from_pretrained(packed, tmp_path / "adapters", is_trainable=True)
    same(run(ours, tmp_path / "c"), run(reference, tmp_path / "d"), evaluated=evaluated)


@pytest.mark.usefixtures("repacking")
@pytest.mark.parametrize("options", [{}, {"double_quant": True}], ids=["nf4", "double"])
def test_no_way_in_repacks_a_weight(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    written = quantize(model, out, bits=4, **options)  # records its answers: a forward
    loaded = read(out)
    measured = open_folder("ours", str(out), "causal-lm").model
    model.save_pretrained(tmp_path / "dense")
    teacher = Distillation(str(tmp_path / "dense"), teacher_bits=4)
    loop = trainer(tiny("llama"), tmp_path / "t", [teacher], max_steps=1)
    given = type(model).from_pretrained(out)  # by a person, who knows nothing of this
    by_hand = trainer(get_peft_model(given, LoraConfig(target_modules="all-linear")), tmp_path / "g", [])
    for packed in (written.model, loaded, measured, teacher._teachers[0], by_hand.model):
        layers = [m for m in packed.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(layers) == 14
        with torch.no_grad():
            packed.eval()(IDS)
    loop.train()

    patch = tmp_path / "patch"  # the same in the fresh process of verify
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "from bitsandbytes.nn import modules\n"
        "modules.has_avx512bf16 = lambda: True\n"
        "modules._convert_weight_packed_for_cpu = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(patch), os.environ.get("PYTHONPATH", "")]))
    assert verify(out)[str(out)]["logits_difference"] < 1e-5


def test_only_time_is_taken_of_repacked_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever opens the folder on such a CPU gets it; quality is that of the codes in it."""
    model, out, dense = tiny("llama", vocab_size=len(WORDS)), tmp_path / "out", tmp_path / "dense"
    quantize(model, out, bits=4)
    model.save_pretrained(dense)
    save_tokenizer(dense)
    packed: list[Tensor] = []

    def pack(codes: Tensor, state: object) -> tuple[Tensor, object]:
        packed.append(codes)
        return codes, state  # the kernel itself does not run everywhere

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", pack)
    measured: list[str] = []

    def watched(measure: Callable[..., Any]) -> Callable[..., Any]:
        def before_packing(*given: Any, **more: Any) -> Any:
            found = measure(*given, **more)
            assert packed == []
            measured.append(measure.__name__)
            return found

        return before_packing

    for name in ("quality", "sparsity"):
        monkeypatch.setattr(evaluation, name, watched(getattr(evaluation, name)))
    data = Data(str(save_reviews(tmp_path / "reviews.csv")), eval_size=8)
    metrics = ["latency", "quality", "kl", "sparsity"]
    spec = evaluation.Evaluate(metrics=metrics, batch_sizes=[1], length=8, repeats=2)
    found = evaluation.evaluate(out, dense, data=data, spec=spec)["artefacts"]
    assert measured == ["quality", "sparsity", "sparsity"]
    assert len(packed) >= 14
    assert found["root"]["latency"]["1"]["cpu_ms"]["median"] > 0
    assert found["root"]["repacked"]
    assert "repacked" not in found["dense"]


def test_weights_that_a_forward_repacked_before_are_refused(tmp_path: Path) -> None:
    quantize(tiny("llama"), tmp_path / "out", bits=4)
    model = read(tmp_path / "out")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data, weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    with pytest.raises(CompressError, match=r"repacked[\s\S]*layers.1.mlp.up_proj"):
        disable_cpu_packing(model)


@pytest.mark.parametrize(
    ("changes", "place", "reason"),
    [
        ({"intermediate_size": 160}, "down_proj", "no multiple of 64"),
        ({"intermediate_size": 80}, "gate_proj", "of 32"),
    ],
)
def test_shapes_that_some_cpu_cannot_run_stay_dense(changes: dict, place: str, reason: str, tmp_path: Path) -> None:
    model = tiny("llama", **changes)
    written = backends["bitsandbytes"](model, None, tmp_path / "out", bits=4)
    left = [name for why, names in written.coverage.skipped.items() if reason in why for name in names]
    assert f"model.layers.0.mlp.{place}.weight" in left
    stored = dict(type(model).from_pretrained(tmp_path / "out").named_parameters())
    for name in left:
        assert torch.equal(stored[name], dict(model.named_parameters())[name])


def test_a_model_that_a_person_packed_needs_no_backend(tmp_path: Path) -> None:
    """Ours reads the same as bitsandbytes' own way in."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    own = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    disable_cpu_packing(own)
    ours = quantize(model, tmp_path / "out", bits=4).model
    with torch.no_grad():
        assert torch.equal(own(IDS).logits, ours(IDS).logits)
