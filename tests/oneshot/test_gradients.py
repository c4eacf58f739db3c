"""Gradients of the calibration loss: against autograd on the whole, whatever the batches, and the model untouched."""

import pytest
import torch
from transformers import PreTrainedModel

from hf_compress.errors import CompressError
from hf_compress.oneshot.gradients import gradient_statistics
from hf_compress.weights import weights
from tests.models import tiny
from tests.training import collate, rows


def batches(size: int, count: int = 8) -> list[dict[str, torch.Tensor]]:
    data = rows(count)
    made = [collate([data[i] for i in range(start, start + size)]) for start in range(0, count, size)]
    return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in made]


def directly(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the mean over predicted tokens, written out."""
    model.zero_grad()
    logits = model(**batch).logits[:, :-1].float()
    kept = batch["attention_mask"][:, 1:].bool()
    torch.nn.functional.cross_entropy(logits[kept], batch["input_ids"][:, 1:][kept]).backward()
    found = {w.name: w.of(w.whole.grad).clone() for w in weights(model)}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "qwen2_moe"])
def test_gradient_is_that_of_all_tokens_and_fisher_the_mean_square_over_batches(name: str) -> None:
    model = tiny(name)
    each = [directly(model, batch) for batch in batches(2)]
    counts = [int(b["attention_mask"][:, 1:].sum()) for b in batches(2)]
    found = gradient_statistics(model, batches(2))
    assert set(found) == {w.name for w in weights(model)}
    for weight in weights(model):
        mean = sum(g[weight.name] * n for g, n in zip(each, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(found[weight.name].gradient, mean, atol=1e-5, rtol=1e-3)
        square = sum(g[weight.name].square() for g in each) / len(each)
        torch.testing.assert_close(found[weight.name].fisher, square, atol=1e-6, rtol=1e-3)
    whole = gradient_statistics(model, batches(8))
    for key, statistics in found.items():
        torch.testing.assert_close(whole[key].gradient, statistics.gradient, atol=1e-5, rtol=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama", tie_word_embeddings=True).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    with torch.no_grad():  # as one-shot stages run
        found = gradient_statistics(model, batches(4))
    assert all(s.gradient.abs().sum() > 0 for s in found.values())
    assert not any("embed" in name or "lm_head" in name for name in found)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert (model.get_input_embeddings().weight.grad == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not model.get_input_embeddings().weight)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_do_not_pile_up() -> None:
    """While one parameter's gradient is added, no other's is held."""
    model, held = tiny("llama"), []
    parameters = [w.whole for w in weights(model)]
    hook = parameters[0].register_hook(lambda g: held.append(sum(p.grad is not None for p in parameters)))
    gradient_statistics(model, batches(4))
    hook.remove()
    assert max(held) == 0


def test_classifiers_need_labels() -> None:
    model = tiny("bert")
    with pytest.raises(CompressError, match=r"holds no labels[\s\S]*batch 0"):
        gradient_statistics(model, batches(4))
    labelled = [b | {"labels": torch.tensor([0, 1, 0, 1])} for b in batches(4)]
    found = gradient_statistics(model, labelled)
    model.zero_grad()
    (sum(model(**b).loss for b in labelled) / 2).backward()
    for weight in weights(model):
        expected = weight.of(weight.whole.grad)
        torch.testing.assert_close(found[weight.name].gradient, expected, atol=1e-6, rtol=1e-3)


def test_empty_and_broken_calibration_is_refused() -> None:
    with pytest.raises(CompressError, match="nothing to calibrate"):
        gradient_statistics(tiny("llama"), [])
    with pytest.raises(CompressError, match=r"no token to predict[\s\S]*batch 0"):
        gradient_statistics(tiny("llama"), [{"input_ids": torch.tensor([[3]])}])
    model = tiny("llama")
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(CompressError, match=r"not finite[\s\S]*batch 0"):
        gradient_statistics(model, batches(4))


def test_dropout_is_off_frozen_weights_are_seen_and_nothing_else_gets_a_gradient() -> None:
    expected, model = gradient_statistics(tiny("gpt2"), batches(4)), tiny("gpt2").train()
    weights(model)[0].whole.requires_grad_(False)
    touched = []
    hook = model.get_input_embeddings().weight.register_hook(touched.append)
    found = gradient_statistics(model, batches(4))
    hook.remove()
    assert not touched
    for name, statistics in expected.items():
        torch.testing.assert_close(found[name].gradient, statistics.gradient)
