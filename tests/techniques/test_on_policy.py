"""Batches that the student writes: what they hold, how often they come, and who may ask for them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compress.errors import CompressError
from hf_compress.recipe import parse
from hf_compress.techniques.distillation import Distillation
from hf_compress.techniques.on_policy import continued
from hf_compress.techniques.pruning import Pruning
from hf_compress.techniques.qat import QAT
from tests.contracts.test_loss_scale import models
from tests.models import tiny
from tests.ranks import on_two_ranks
from tests.training import collate, rows, trainer


def batch_of(left: bool = False) -> dict[str, torch.Tensor]:
    """Three rows of 5, 8 and 11 tokens; the second has a prompt of three."""
    batch = collate([rows()[i] for i in range(3)])
    batch["labels"][1, :3] = -100
    if left:
        lengths = batch["attention_mask"].sum(1).tolist()
        batch = {k: torch.stack([v.roll(-n) for v, n in zip(t, lengths)]) for k, t in batch.items()}
    return batch


@pytest.mark.parametrize("left", [False, True])
def test_prompts_stay_and_continuations_are_what_is_learned(left: bool) -> None:
    model = tiny("gpt2")  # absolute positions: padding in the wrong place would show
    model.generation_config.eos_token_id = None
    given, made = batch_of(), continued(model, batch_of(left), seed=0)
    assert made["attention_mask"].sum(1).tolist() == [5, 8, 11]
    for row, prompt in enumerate((2, 3, 5)):  # the half, the prompt, the half
        length = (5, 8, 11)[row]
        assert made["input_ids"][row, :prompt].tolist() == given["input_ids"][row, :prompt].tolist()
        assert (made["labels"][row, :prompt] == -100).all()
        assert made["labels"][row, prompt:length].tolist() == made["input_ids"][row, prompt:length].tolist()
        assert (made["labels"][row, length:] == -100).all()
    assert not torch.equal(made["input_ids"], given["input_ids"])


@pytest.mark.parametrize("positions", [16, 128])
def test_no_position_is_passed_where_prompts_differ_in_length(positions: int) -> None:
    """Rows as long as the model's positions: a long prompt and a long continuation are not of one row. Where all fit
    together they are written together."""
    model = tiny("gpt2", n_positions=positions)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3], labels[1, :14] = -100, -100
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    made = continued(model, {"input_ids": ids, "labels": labels}, seed=0)
    assert len(calls) == (13 + 2 if positions == 16 else 13)
    assert ((made["labels"] != -100) == (labels != -100)).all()
    assert torch.equal(made["input_ids"][labels == -100], ids[labels == -100])


def test_draws_are_those_of_the_student() -> None:
    """A student whose likeliest token has nearly all of the probability writes that token, each position its own."""
    model = tiny("gpt2", tie_word_embeddings=False)
    model.lm_head.weight.data *= 500
    model.generation_config.eos_token_id = None
    made = continued(model, batch_of(), seed=0)
    with torch.no_grad():
        logits = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
    learned = made["labels"][:, 1:] != -100
    assert torch.equal(logits[:, :-1].argmax(-1)[learned], made["labels"][:, 1:][learned])
    assert not torch.equal(made["input_ids"], continued(tiny("gpt2"), batch_of(), seed=0)["input_ids"])


def test_draws_are_from_the_whole_vocabulary() -> None:
    """A student that finds every token about as likely: 100 draws are of about 70 of its 128 tokens."""
    model = tiny("gpt2", tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e-3
    batch = {"input_ids": torch.full((100, 2), 5), "labels": torch.full((100, 2), 5)}
    assert len(continued(model, batch, seed=0)["input_ids"][:, 1].unique()) > 55


@pytest.mark.parametrize(
    "its_own",
    [{"num_beams": 2}, {"min_p": 0.9}, {"suppress_tokens": list(range(64))}, {"no_repeat_ngram_size": 1}],
    ids=lambda its_own: next(iter(its_own)),
)
def test_how_a_model_likes_to_write_plays_no_part(its_own: dict[str, Any]) -> None:
    """Its generation_config may ask for beams, cuts and penalties; draws are from the whole distribution."""
    model = tiny("llama")
    plain = continued(model, batch_of(), seed=0)
    model.generation_config.update(**its_own)
    kept = model.generation_config
    assert torch.equal(continued(model, batch_of(), seed=0)["input_ids"], plain["input_ids"])
    assert model.generation_config is kept


def test_a_text_ends_at_the_end_token_or_where_the_row_did() -> None:
    """A student that writes 7 or 8, as chance has it; 7 ends a text, each row at its own time."""
    model = tiny("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(128))
    model.lm_head.bias.data[7:9] = torch.tensor([1e4, 1e4 + 1])
    model.lm_head.weight.data[7:9] = 0
    model.generation_config.eos_token_id = [9, 7]
    early = 0
    for seed in range(10):
        made = continued(model, batch_of(), seed=seed)
        for labels, prompt, length in zip(made["labels"].tolist(), (2, 3, 5), (5, 8, 11)):
            new = [label for label in labels if label != -100]
            assert set(new[:-1]) <= {8}
            assert new[-1] in (7, 8)
            assert len(new) == length - prompt or (len(new) < length - prompt and new[-1] == 7)
            early += len(new) < length - prompt
    assert 5 < early < 30


def test_drawing_leaves_the_run_s_random_numbers_and_the_model_s_mode_alone() -> None:
    model = tiny("llama").train()
    before = torch.random.get_rng_state()
    first, again, other = (continued(model, batch_of(), seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 5, 15), (1.0, 20, 20)])
def test_the_share_of_batches(share: float, least: int, most: int, tmp_path: Path) -> None:
    """20 micro-batches in 10 steps; what is counted as items is what the student wrote."""
    run = trainer(
        tiny("llama"),
        tmp_path,
        [Distillation(tiny("llama", seed=1), lmbda=share)],
        task_weight=0.0,
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    seen: list[Any] = []
    compute = run.compute_loss

    def watched(model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        seen.append((inputs["labels"], others["num_items_in_batch"]))
        return compute(model, inputs, *args, **others)

    run.compute_loss = watched
    run.train()
    written = sum(bool((labels[:, 0] == -100).all()) for labels, _ in seen)
    assert len(seen) == 20
    assert least <= written <= most
    for first, second in zip(seen[::2], seen[1::2]):
        assert first[1] == sum(int((labels[:, 1:] != -100).sum()) for labels, _ in (first, second))


def written_on_a_rank(folder: Path, share: float) -> dict[str, Any]:
    """All rows are alike, so that only the draws tell the ranks apart."""
    technique = Distillation(tiny("llama", seed=1), lmbda=share)
    run = trainer(
        tiny("llama"),
        folder,
        [technique],
        task_weight=0.0,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    given = collate([rows()[2]] * 2)
    run.data_collator = lambda _: dict(given)
    seen: list[Any] = []
    compute = run.compute_loss

    def watched(model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        seen.append((inputs["labels"].clone(), int(others["num_items_in_batch"])))
        return compute(model, inputs, *args, **others)

    run.compute_loss = watched
    run.train()
    weights = {k: v.clone() for k, v in run.model.state_dict().items()}
    return {"given": given["labels"], "seen": seen, "weights": weights}


def test_two_ranks_write_texts_of_their_own_and_stay_in_step(tmp_path: Path) -> None:
    found = on_two_ranks(__name__, "written_on_a_rank(folder, 0.5)", tmp_path)
    first, second = found
    assert all(torch.equal(first["weights"][k], second["weights"][k]) for k in first["weights"])
    wrote = [[bool((labels[:, 0] == -100).all()) for labels, _ in rank["seen"]] for rank in found]
    assert wrote[0] == wrote[1]
    assert True in wrote[0]
    assert False in wrote[0]
    for index, by_student in enumerate(wrote[0]):
        ours, theirs = (rank["seen"][index][0] for rank in found)
        alike = ours.shape == theirs.shape and torch.equal(ours, theirs)
        assert alike != by_student
        assert by_student or torch.equal(ours, first["given"])
    for step in range(0, 6, 2):  # items: of both micro-batches of both ranks
        both = [rank["seen"][step + i] for rank in found for i in (0, 1)]
        items = sum(int((labels[:, 1:] != -100).sum()) for labels, _ in both)
        assert {counted for _, counted in both} == {items}


def test_beside_masks_fake_quantization_chunks_and_features(tmp_path: Path) -> None:
    technique = Distillation(tiny("llama", seed=1), lmbda=1.0, chunked=True, features={"hidden_mse": 1.0})
    run = trainer(tiny("llama"), tmp_path, [technique, Pruning(0.5, every=1), QAT(8)], task_weight=0.0)
    run.train()
    logged = [entry["loss_distill"] for entry in run.state.log_history if "loss" in entry]
    assert all(value > 0 for value in logged)


def test_a_task_loss_and_other_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no labels"):
        trainer(tiny("llama"), tmp_path, [Distillation(tiny("llama", seed=1), lmbda=0.5)])
    with pytest.raises(CompressError, match="only causal"):
        trainer(tiny("bert"), tmp_path, [Distillation(tiny("bert", seed=1), lmbda=0.5)], task_weight=0.0)
    student, teacher = models("t5")
    with pytest.raises(CompressError, match="only causal"):
        trainer(student, tmp_path, [Distillation(teacher, lmbda=0.5)], task_weight=0.0)
    recipe = {"name": "r", "model": {"id": "m"}, "data": {"id": "d.csv"}}
    recipe["stages"] = [{"train": {"distill": {"teacher_model": "dense", "lmbda": 0.5}}}]
    with pytest.raises(CompressError, match="task_weight"):
        parse(recipe)
