"""Masks and grids act on W + BA: what is trained is what is merged; adapters without one W + BA are refused."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from hf_compress.errors import CompressError
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.lora import Merged
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import trainer

IDS = torch.arange(3, 19)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft sets it right for Conv1D
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys"),  # peft's own, for experts without adapters
]


class Watch(TrainerCallback):
    """What the student answers after the last step, and its keys then."""

    def __init__(self, student: torch.nn.Module) -> None:
        self.student = student

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        self.logits, self.keys = self.student.eval()(IDS).logits, set(self.student.state_dict())
        self.student.train()


def adapted(model: PreTrainedModel, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(settings | options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_the_trained_function_is_the_merged_one_and_its_zeros_are_exact(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    student = adapted(tiny(name).to(dtype), init_lora_weights=True)
    keys = set(student.state_dict())
    pruning = Pruning(0.5, "2:4", criterion="wanda", every=1, end=0.5)
    run = trainer(student, tmp_path, [pruning], max_steps=4)
    assert {w.parameter for w in pruning._weights if w.expert is not None} <= set(pruning._adapted)
    watch = Watch(student)
    run.add_callback(watch)
    run.train()
    assert watch.keys == keys
    assert run.model is student.get_base_model()
    assert student.merge_and_unload() is run.model  # what a script does that knows nothing of this
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(IDS).logits, watch.logits, **tolerance)
    run.save_model(str(tmp_path / "out"))
    for model in (run.model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        for weight in weights(model):
            assert ((weight.matrix.reshape(-1, 4) != 0).sum(1) == 2).all(), weight.name
    assert not any(isinstance(module.forward, Merged) for module in student.modules())


def test_the_mask_is_chosen_on_the_sum_and_gradients_see_it(tmp_path: Path) -> None:
    student = adapted(tiny("llama"))
    run = trainer(student, tmp_path, [Pruning(0.5, schedule="oneshot")], max_steps=1, learning_rate=0.0)
    layer = student.get_base_model().model.layers[0].mlp.up_proj
    total = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    run.train()
    final = run.model.model.layers[0].mlp.up_proj.weight
    expected = total.abs().flatten().argsort()[: total.numel() // 2]
    assert set((final == 0).flatten().nonzero().squeeze(1).tolist()) == set(expected.tolist())
    torch.testing.assert_close(final[final != 0], total[final != 0], atol=1e-6, rtol=1e-5)


def test_gradients_of_a_and_b_are_those_of_the_masked_sum(tmp_path: Path) -> None:
    student = adapted(tiny("llama"))
    pruning = Pruning(0.5)
    trainer(student, tmp_path, [pruning])
    weight = next(w for w in pruning._weights if "up_proj" in w.name)
    pruning._masks.set(weight, torch.rand(weight.shape) > 0.5)
    layer, mask, x = (
        student.get_base_model().model.layers[0].mlp.up_proj,
        pruning._masks.of(weight),
        torch.randn(3, 64),
    )
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = torch.autograd.grad((x @ (mask * (weight.whole + 4 * b @ a)).T).square().sum(), [a, b])
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), [a, b]), expected)


def test_switched_off_adapters_are_the_dense_base(tmp_path: Path) -> None:
    dense = tiny("llama")(IDS).logits
    student = adapted(tiny("llama"))
    techniques = [Distillation("base"), Pruning(0.5, schedule="oneshot")]
    run = trainer(student, tmp_path, techniques, max_steps=1)
    masked = Watch(student)

    class Base(Watch):
        def on_step_end(self, *args, **kwargs):
            with student.disable_adapter():
                super().on_step_end(*args, **kwargs)

    base = Base(student)
    run.add_callback(masked)
    run.add_callback(base)
    run.train()
    torch.testing.assert_close(base.logits, dense)
    assert not torch.allclose(masked.logits, dense, atol=1e-2)
    bare = adapted(tiny("llama"), target_modules=["q_proj"])
    with pytest.raises(CompressError, match="the teacher `base` would change"):
        trainer(bare, tmp_path, [Distillation("base"), Pruning(0.5)])
    with pytest.raises(CompressError, match="the teacher `base` would change"):
        trainer(bare, tmp_path, [Distillation("base"), QAT(4, 32)])


def test_rounding_acts_on_the_masked_sum(tmp_path: Path) -> None:
    student = adapted(tiny("gpt2"))
    run = trainer(student, tmp_path, [Pruning(0.5, schedule="oneshot"), QAT(4, 32)], max_steps=2)
    watch = Watch(student)
    run.add_callback(watch)
    run.train()
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(IDS).logits, watch.logits, atol=1e-4, rtol=1e-3)
    for weight in weights(run.model):
        assert (weight.matrix == 0).sum() >= weight.matrix.numel() // 2
        assert len(weight.matrix.unflatten(1, (-1, 32))[0, 0].unique()) <= 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "dropout on the adapter"),
        ({"use_dora": True}, "variant of LoRA"),
        ({"lora_bias": True}, "bias in B"),
    ],
)
@pytest.mark.parametrize("technique", [Pruning(0.5), QAT(4, 32)], ids=["pruning", "qat"])
def test_adapters_without_one_matrix_are_refused(
    technique: Pruning | QAT, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=message):
        trainer(adapted(tiny("gpt2"), **options), tmp_path, [technique])


def test_other_adapters_and_criteria_without_gradients_are_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(CompressError, match="these adapters are IA3"):
        trainer(get_peft_model(tiny("llama"), config), tmp_path, [Pruning(0.5)])
    with pytest.raises(CompressError, match="only A and B have any"):
        trainer(adapted(tiny("llama")), tmp_path, [Pruning(0.5, criterion="taylor")])
