"""Feature terms on real models: what is watched in each family, layer maps, projections, clear refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import TrainerCallback

from hf_compress.errors import CompressError
from hf_compress.techniques.capture import Capture
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.features import layer_map
from tests.contracts.test_loss_scale import models
from tests.models import CAUSAL, tiny
from tests.training import collate, rows, trainer

BATCH = {k: v for k, v in collate([rows()[i] for i in range(3)]).items() if k != "labels"}
SHAPE = tuple(BATCH["input_ids"].shape)


def watched(model: Any, kind: str, block: int) -> Any:
    capture = Capture(model, {(kind, block)})
    with torch.no_grad(), capture.on():
        out = model(**BATCH, output_hidden_states=True)
    return out, capture.at((kind, block), (SHAPE[0], SHAPE[1]))


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_hidden_states_are_the_block_s_output(name: str) -> None:
    out, found = watched(tiny(name), "hidden", 0)
    torch.testing.assert_close(found, out.hidden_states[1])
    _, (entering, leaving) = watched(tiny(name), "flow", 0)
    torch.testing.assert_close((entering, leaving), (out.hidden_states[0], out.hidden_states[1]))


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_queries_keys_and_values_are_those_of_the_attention(name: str) -> None:
    """Values: turned into the attention's output by its maps and its output matrix. Queries and keys: those whose
    scores are the maps, where no rotary embedding stands between (GPT-2, BERT)."""
    model = tiny(name)
    model.set_attn_implementation("eager")
    _, (queries, keys, values) = watched(model, "qkv", 0)
    assert queries.shape[:2] == keys.shape[:2] == values.shape[:2] == SHAPE
    _, maps = watched(model, "attention", 0)
    heads = maps.shape[1]
    repeat = heads * 32 // values.shape[-1]
    mixed = maps @ values.unflatten(-1, (-1, 32)).transpose(1, 2).repeat_interleave(repeat, 1)
    seen: list[torch.Tensor] = []
    outs = {"gpt2": "attn.c_proj", "bert": "attention.output.dense"}
    from hf_compress.weights import blocks_of

    module = blocks_of(model)[0].get_submodule(outs.get(name, "self_attn.o_proj"))
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**BATCH)
    handle.remove()
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), seen[0], atol=1e-5, rtol=1e-4)
    if name in ("gpt2", "bert"):
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
        scores = q @ k.transpose(-1, -2) / 32**0.5
        last = scores[0, :, 4].masked_fill(maps[0, :, 4] == 0, -1e9).softmax(-1)
        torch.testing.assert_close(last, maps[0, :, 4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe"])
def test_router_logits_are_the_router_s(name: str) -> None:
    model = tiny(name)
    _, found = watched(model, "router", 1)
    assert found.shape == (*SHAPE, 4)
    block = model.model.layers[1]
    caught: list[torch.Tensor] = []
    handle = block.mlp.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model(**BATCH)
    handle.remove()
    torch.testing.assert_close(found, caught[0] @ block.mlp.gate.weight.T, atol=1e-5, rtol=1e-4)


def test_layer_maps() -> None:
    assert layer_map(None, 3, 6, where="") == layer_map("uniform", 3, 6, where="") == [(0, 1), (1, 3), (2, 5)]
    assert layer_map("last", 3, 6, where="") == [(2, 5)]
    assert layer_map(None, 6, 2, where="") == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]  # a deeper student
    assert layer_map([0, 0, 4], 3, 6, where="") == [(0, 0), (1, 0), (2, 4)]
    for wrong, message in (
        ([0, 6, 1], "does not map"),
        ([0], "does not map"),
        ("first", "first"),
        ("record", "recipe"),
    ):
        with pytest.raises(CompressError, match=message):
            layer_map(wrong, 3, 6, where="")


def test_routers_are_compared_where_there_are_some(tmp_path: Path) -> None:
    """The first block of a DeepSeek model is dense: a map from dense to dense is left out, one to a router refused."""
    student, teacher = tiny("deepseek_v3"), tiny("deepseek_v3", seed=1, num_hidden_layers=3)

    def pairs(mapped: Any) -> list[tuple[int, int]]:
        technique = Distillation(teacher, features={"router_kl": 1.0}, layer_map=mapped)
        trainer(student, tmp_path, [technique])
        return technique._terms[0].pairs

    assert pairs([0, 2]) == pairs(None) == [(1, 2)]
    with pytest.raises(CompressError, match="no router"):
        pairs([1, 2])


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    student, teacher = models("t5")
    with pytest.raises(CompressError, match="two stacks of blocks"):
        trainer(student, tmp_path, [Distillation(teacher, features={"hidden_mse": 1.0})])


def test_each_feature_lowers_itself(tmp_path: Path) -> None:
    """Trained on one feature alone, through a projection where widths differ, the feature falls."""
    student, teacher = tiny("qwen3_moe"), tiny("qwen3_moe", seed=1, hidden_size=128)
    features = {"hidden_mse": {"weight": 1.0, "layer_map": "last"}, "relations": 1.0, "router_kl": 1.0}
    technique = Distillation(teacher, weight=0.0, features=features)
    run = trainer(student, tmp_path, [technique], task_weight=0.0, max_steps=20, learning_rate=3e-3)
    before = [p.detach().clone() for p in technique.parameters()]
    assert len(before) == 1  # one projection: for the last blocks of hidden_mse; the others need none
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    for name in features:
        assert logs[-1][f"loss_{name}"] < 0.9 * logs[0][f"loss_{name}"]
    assert technique.parameters() == []
    assert not run.model.model.layers[1]._forward_hooks


def test_projections_begin_each_step_without_gradients(tmp_path: Path) -> None:
    """The Trainer zeroes the model's gradients alone; what is left would add up from step to step."""
    technique = Distillation(tiny("llama", seed=1, hidden_size=128), features={"hidden_mse": 1.0})
    run = trainer(tiny("llama"), tmp_path, [technique])
    left: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            left.extend(p.grad is not None for p in technique.parameters())

    run.add_callback(Watch())
    run.train()
    assert left == [False] * 8  # two projections, four steps


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_positions_weigh_alike_in_language_models_and_examples_in_classifiers(name: str, tmp_path: Path) -> None:
    student, teacher = tiny(name), tiny(name, seed=1)
    run = trainer(student, tmp_path, [Distillation(teacher, features={"hidden_mse": 0.5}, layer_map="last")])
    batch = collate([rows(classes=name == "bert")[i] for i in range(3)])
    student.eval()
    with torch.no_grad():
        run.compute_loss(run.model, dict(batch))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    ours, theirs = (watched_on(model, inputs) for model in (student, teacher))
    each = (ours - theirs).square().mean(-1) / theirs.square().mean(-1)
    if name == "llama":
        expected = each[:, :-1][batch["labels"][:, 1:] != -100].mean()
    else:
        mask = batch["attention_mask"]
        expected = ((each * mask).sum(1) / mask.sum(1)).mean()
    total, items = run._eval_logged["hidden_mse"][0]
    torch.testing.assert_close(total / items, 0.5 * expected)


def watched_on(model: Any, inputs: Any) -> torch.Tensor:
    capture = Capture(model, {("hidden", 1)})
    with torch.no_grad(), capture.on():
        model(**inputs)
    return capture.found["hidden", 1]


def test_a_base_and_its_adapters_are_watched_apart(tmp_path: Path) -> None:
    """Student and teacher are the same modules, run after one another."""
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0))
    run = trainer(student, tmp_path, [Distillation("base", features={"hidden_mse": 1.0})])
    run.train()
    values = [entry["loss_hidden_mse"] for entry in run.state.log_history if "loss" in entry]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[-1] > 1e-4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        features = {"hidden_mse": 1.0, "relations": 1.0}
        student = tiny("llama")
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = trainer(student, tmp_path, [Distillation(tiny("llama", seed=1), features=features)], max_steps=2)
        run.train()
        assert student.is_gradient_checkpointing == checkpointing
        found.append(dict(run.model.state_dict()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_checkpointing_that_keeps_no_gradient_inside_blocks_is_refused(tmp_path: Path) -> None:
    """Reentrant: what is seen inside a block was computed without a graph, and the term would teach nothing."""
    run = trainer(
        tiny("llama"),
        tmp_path,
        [Distillation(tiny("llama", seed=1), features={"relations": 1.0})],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(CompressError, match="no gradient comes back"):
        run.train()


def test_attention_maps_after_dropout_are_refused(tmp_path: Path) -> None:
    student, teacher = tiny("bert", attention_probs_dropout_prob=0.1), tiny("bert", seed=1)
    run = trainer(student, tmp_path, [Distillation(teacher, features={"attention_kl": 1.0})])
    assert run.evaluate()["eval_loss"] > 0  # no dropout here
    with pytest.raises(CompressError, match="do not sum to 1"):
        run.train()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_for_attention_maps_both_models_attend_eagerly_while_they_are_compared(name: str, tmp_path: Path) -> None:
    calm = {"attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    student, teacher = (tiny(name, seed=seed, **calm) for seed in (0, 1))
    run = trainer(student, tmp_path, [Distillation(teacher, features={"attention_kl": 1.0})])
    assert {m.config._attn_implementation for m in (student, teacher)} == {"eager"}
    run.train()
    assert run.state.log_history[0]["loss_attention_kl"] > 0
    assert {m.config._attn_implementation for m in (student, teacher)} == {"sdpa"}


def test_attention_comes_back_where_the_teacher_is_the_model_under_its_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student = tiny("llama")
    adapted = get_peft_model(student, LoraConfig(target_modules="all-linear"))
    trainer(adapted, tmp_path, [Distillation("base", features={"attention_kl": 1.0})]).train()
    assert student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"hiden_mse": 1.0}, "hidden_mse"),
        ({"forward_kl": 1.0}, "not about features"),
        ({"relations": {"heads": 2}}, "relation_heads"),
        ({"hidden_mse": "much"}, "no weight"),
        ({"router_kl": 1.0}, "no router"),
        ({"hidden_mse": {"layer_map": [0, 7]}}, "layer_map"),
    ],
)
def test_bad_features_are_refused_before_training(features: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=message):
        trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1), features=features)])


def test_a_recipe_s_mapping_is_validated() -> None:
    made = TypeAdapter(Distillation).validate_python(
        {"teacher_model": "dense", "layer_map": "last", "features": {"cka": 0.5}}
    )
    assert (made.layer_map, made.features) == ("last", {"cka": 0.5})
