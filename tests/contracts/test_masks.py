"""Contract 3: zeros stay zero, through every optimizer, way of training, container and reload, and N:M stays N:M."""

from itertools import pairwise
from pathlib import Path

import bitsandbytes
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback

from hf_compress.backends import backends
from hf_compress.backends.onnx import export_onnx
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from hf_compress.weights import weights
from tests.models import tiny
from tests.ranks import on_two_ranks
from tests.training import trainer

OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
    "adamw8bit": {"optim": "adamw_bnb_8bit"},
    "lion8bit": {"optim": "lion_8bit"},
}
WAYS = {
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "clipping": {"max_grad_norm": 0.1},
    "decay": {"weight_decay": 0.3},
    "bf16": {"bf16": True, "activation_checkpointing": True},
    "lora": {},
    "resume": {"save_strategy": "steps", "save_steps": 2},
}


def check(model: PreTrainedModel, sparsity: float = 0.5) -> None:
    for weight in weights(model):
        assert (weight.matrix == 0).sum() == round(sparsity * weight.matrix.numel()), weight.name


def check_two_of_four(model: PreTrainedModel) -> None:
    for weight in weights(model):
        assert ((weight.matrix.reshape(-1, 4) != 0).sum(1) == 2).all(), weight.name


class ZerosAtEveryStep(TrainerCallback):
    """Gradients under the mask are zero before a step; weights and moments, as a checkpoint would hold them, after."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning, self.moments = pruning, 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for weight in self.pruning._weights if self.pruning._masks else []:
            if weight.whole.grad is not None:
                assert (weight.of(weight.whole.grad)[~self.pruning._masks.of(weight)] == 0).all(), weight.name

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for weight in self.pruning._weights if self.pruning._masks else []:
            dropped = ~self.pruning._masks.of(weight)
            if not weight.whole.requires_grad:
                continue
            assert (weight.matrix[dropped] == 0).all(), (weight.name, state.global_step)
            moments = optimizer.state[weight.whole]
            for name, moment in moments.items():
                if isinstance(moment, torch.Tensor) and moment.shape == weight.whole.shape:
                    value = moment if moment.is_floating_point() else moments[f"qmap{name[-1]}"][moment.long()]
                    assert (weight.of(value)[dropped] == 0).all(), weight.name
                    self.moments += 1


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=16))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_hold_under_every_optimizer_and_way_of_training(optimizer: str, way: str, tmp_path: Path) -> None:
    def begin(model: PreTrainedModel):
        pruning = Pruning(0.5, "2:4", every=2, end=0.5)
        student = adapted(model) if way == "lora" else model
        run = trainer(student, tmp_path, [pruning], max_steps=6, **OPTIMIZERS[optimizer], **WAYS[way])
        watch = ZerosAtEveryStep(pruning)
        run.add_callback(watch)
        return run, watch

    run, watch = begin(tiny("llama"))
    before = {w.name: w.matrix.clone() for w in weights(run.model)}
    run.train()
    if way == "resume":
        run, watch = begin(tiny("llama", seed=3))
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert watch.moments > 0 or way == "lora" or optimizer == "adafactor"
    check_two_of_four(run.model)
    assert all((w.matrix != before[w.name])[w.matrix != 0].any() for w in weights(run.model))
    run.save_model(str(tmp_path / "saved"))
    check_two_of_four(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt2", "bert"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_zeros_hold_in_every_family(name: str, pattern: str, tmp_path: Path) -> None:
    pruning = Pruning(0.5, pattern, every=2, end=0.5)
    run = trainer(tiny(name), tmp_path, [pruning], max_steps=6, weight_decay=0.1)
    run.add_callback(ZerosAtEveryStep(pruning))
    run.train()
    check(run.model)
    run.save_model(str(tmp_path / "saved"))
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "saved")
    check(again)
    if pattern == "4x1":
        for weight in weights(again):
            tiles = (weight.matrix == 0).reshape(-1, 4, weight.shape[1])
            assert torch.equal(tiles.all(1), tiles.any(1))


def test_a_pruned_model_keeps_exactly_its_zeros(tmp_path: Path) -> None:
    first = trainer(tiny("llama"), tmp_path, [Pruning(0.5, "2:4", every=1)], max_steps=4)
    first.train()
    before = {w.name: w.matrix == 0 for w in weights(first.model)}
    again = trainer(first.model, tmp_path, [Pruning(0.5, "2:4", schedule="constant"), QAT(4, 32)], max_steps=4)
    again.train()
    for weight in weights(again.model):
        assert (weight.matrix[before[weight.name]] == 0).all()
    assert again.techniques[0].facts()["masks_sha256"] == first.techniques[0].facts()["masks_sha256"]


NESTED = [
    {},
    {"group": "global"},
    {"criterion": "movement"},
    {"criterion": "movement", "group": "global"},
    {"criterion": "movement", "pattern": "2x2"},
]


@pytest.mark.parametrize("options", NESTED)
def test_masks_are_nested_while_sparsity_grows(options: dict, tmp_path: Path) -> None:
    pruning = Pruning(0.8, every=1, end=1.0, **options)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.extend([pruning._masks.items()] if pruning._masks else [])

    run = trainer(tiny("llama"), tmp_path, [pruning], max_steps=6)
    run.add_callback(Watch())
    run.train()
    seen = [masks for masks in seen if not all(mask.all() for mask in masks.values())]
    assert len(seen) >= 4
    for earlier, later in pairwise(seen):
        assert all((later[k] <= earlier[k]).all() for k in later)
        assert any((later[k] < earlier[k]).any() for k in later)


CONTAINERS = {
    "bitsandbytes": [{"bits": 8}, {"bits": 4}],
    "compressed-tensors": [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}],
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families trained to 2:4 and saved."""
    root = tmp_path_factory.mktemp("pruned")
    for name in ("llama", "deepseek_v3", "bert"):
        run = trainer(tiny(name), root / "run", [Pruning(0.5, "2:4", schedule="oneshot")], max_steps=2)
        run.train()
        run.save_model(str(root / name))
    return {path.name: path for path in root.iterdir()}


def dense_again(module: torch.nn.Module) -> torch.Tensor:
    """What a packed linear layer multiplies with."""
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return module.weight.CB if module.weight.CB is not None else module.weight.data
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize(("backend", "options"), [(b, o) for b, every in CONTAINERS.items() for o in every])
def test_zeros_hold_in_every_container(
    name: str, backend: str, options: dict, pruned: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned[name])
    zeros = {w.name: w.matrix == 0 for w in weights(model)}
    written = backends[backend](model, None, tmp_path / "out", **options)
    skipped = {n for names in written.coverage.skipped.values() for n in names}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if backend == "compressed-tensors":  # unpacks at the first forward; bitsandbytes packs for the CPU there
        with torch.no_grad():
            opened(torch.arange(3, 19)[None])
    checked = 0
    for weight in weights(opened):
        if weight.name in skipped or weight.name not in zeros:  # scales are matrices too
            continue
        values = dense_again(weight.module) if weight.expert is None else weight.matrix
        assert (values[zeros[weight.name]] == 0).all(), weight.name
        assert ((values.reshape(-1, 4) != 0).sum(1) <= 2).all(), weight.name
        checked += 1
    assert checked == len(zeros) - len(skipped & set(zeros)) > 10


def test_zeros_hold_in_onnx(pruned: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(pruned["bert"])
    export_onnx(model, tmp_path)
    (file,) = tmp_path.rglob("*.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    two_of_four = []
    for name, codes in tensors.items():
        if codes.dtype == "int8" and codes.ndim == 2:  # (in, out); one zero point an output
            zero = tensors[name.removesuffix("_quantized") + "_zero_point"]
            two_of_four.append(((codes != zero).T.reshape(-1, 4).sum(1) <= 2).all())
    assert sum(two_of_four) == len(weights(model))  # the pooler and the classifier are dense


def train_on_ranks(folder: Path, ranks: int) -> str:
    """Masks of a run whose criterion looks at gradients and inputs; its hash."""
    pruning = Pruning(0.5, criterion="gradient_activation", every=1)
    run = trainer(tiny("deepseek_v3"), folder, [pruning], max_steps=3, per_device_train_batch_size=4 // ranks)
    run.train()
    check_rows = [((w.matrix == 0).sum(1) == w.shape[1] // 2).all() for w in weights(run.model)]
    assert all(check_rows)
    return str(pruning.facts()["masks_sha256"])


def test_two_ranks_choose_the_same_masks(tmp_path: Path) -> None:
    first, second = on_two_ranks(__name__, "train_on_ranks(folder, 2)", tmp_path)
    assert first == second
