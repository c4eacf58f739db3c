"""Rows that a model writes to calibrate on: what they begin with, how long they are, when they are the same again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_compress import calibration, precision
from hf_compress.calibration import tokens_in, with_continuations
from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.planning import plan
from hf_compress.recipe import parse
from hf_compress.writing import write
from tests.models import CONFIGS, tiny
from tests.training import decoder_recipe


def given(left: bool = False) -> list[dict[str, torch.Tensor]]:
    """Rows of 40, 24, 12 and 1 tokens in two batches: nothing is begun by the last."""
    made, found = torch.Generator().manual_seed(0), []
    for lengths in ((40, 24), (12, 1)):
        rows = [torch.randint(3, 128, (n,), generator=made) for n in lengths]
        ids = torch.zeros(2, max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(max(lengths) - len(row), None) if left else slice(len(row))
            ids[i, at], mask[i, at] = row, 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v3"])
def test_each_row_is_begun_again_and_as_long_as_it_was(name: str, left: bool) -> None:
    batches = given(left)
    found = with_continuations(tiny(name), batches, 2)
    assert found[:2] == batches
    own, written = rows_of(batches), rows_of(found[2:])
    assert [len(row) for row in written] == [40, 24, 12] * 2
    for row, (before, prompt) in zip(written, [*zip(own[:3], (16, 12, 6), strict=True)] * 2, strict=True):
        assert row[:prompt] == before[:prompt]
        assert row != before
    assert written[:3] != written[3:]
    assert tokens_in(found) == tokens_in(batches) + 2 * (40 + 24 + 12)
    assert {len(batch["input_ids"]) for batch in found} == {2}


def test_a_copy_in_bfloat16_writes_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    writers: list[torch.dtype] = []

    def watched(model: PreTrainedModel, *given: Any, **more: Any) -> list[torch.Tensor]:
        writers.append(model.dtype)
        return write(model, *given, **more)

    monkeypatch.setattr(calibration, "write", watched)
    for name in ("llama", "deepseek_v3"):
        with_continuations(tiny(name), given(), 1)
    assert writers == [torch.bfloat16, torch.float32]


def test_a_text_that_ends_is_followed_by_another() -> None:
    """A model that writes 7 or 8 as chance has it, and 7 ends a text: rows that calibrate are filled all the same."""
    model = tiny("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(128))
    model.lm_head.bias.data[7:9] = 1e4
    model.lm_head.weight.data[7:9] = 0
    model.generation_config.eos_token_id = 7
    (row,) = rows_of(with_continuations(model, given()[:1], 1)[1:])[:1]
    assert len(row) == 40
    assert 7 in row[16:-1]
    (ended,) = write(model, [torch.tensor([5])], [40], seed=0)
    assert ended[-1] == 7
    assert len(ended) < 40


def test_what_was_written_is_kept_and_is_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, model, asked = tmp_path / "text.safetensors", tiny("llama"), []

    def counted(*args: object, **options: object) -> list[torch.Tensor]:
        asked.append(1)
        return write(*args, **options)

    monkeypatch.setattr(calibration, "write", counted)
    monkeypatch.setattr(calibration, "quick_copy", lambda model: model)  # whatever the CPU
    monkeypatch.setattr(calibration, "KEPT", 80 * 2 * 2 * 32 * 4)  # of two rows of 40, two layers of 32 float32
    first = with_continuations(model, given(), 1, saved=saved)
    assert len(asked) == 2
    again = with_continuations(model, given(), 1, saved=saved)
    assert len(asked) == 2
    assert rows_of(first) == rows_of(again)
    other = given()
    other[0]["input_ids"][0, 30] += 1
    for batches, times, seed in ((other, 1, 0), (given(), 2, 0), (given(), 1, 1)):
        asked.clear()
        with_continuations(model, batches, times, seed=seed, saved=saved)
        assert asked
    assert [path.name for path in tmp_path.iterdir()] == ["text.safetensors"]


@pytest.mark.parametrize(("family", "values"), [("llama", 2 * 32), ("gpt2", 2 * 64)])
def test_rows_are_written_in_few_goes_of_like_size(family: str, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of 40 fit. values: keys and values of a token in one of two layers."""
    model, asked = tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2}), list[int]()

    def counted(writer: object, prompts: list[torch.Tensor], *args: object, **options: object) -> list[torch.Tensor]:
        asked.append(len(prompts))
        return write(writer, prompts, *args, **options)

    monkeypatch.setattr(calibration, "write", counted)
    monkeypatch.setattr(calibration, "quick_copy", lambda model: model)
    monkeypatch.setattr(calibration, "KEPT", 5 * 40 * 2 * values * 4)
    ids = torch.arange(21 * 40).view(21, 40) % 100 + 3
    model.train()
    before = torch.get_rng_state()
    for rows, goes in ((5, [5]), (6, [3, 3]), (21, [4, 4, 4, 4, 5])):
        asked.clear()
        with_continuations(model, [{"input_ids": ids[:rows], "attention_mask": torch.ones_like(ids[:rows])}], 1)
        assert asked == goes
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides() -> None:
    model = tiny("llama")
    one, same, other = (rows_of(with_continuations(model, given(), 1, seed=seed)[2:]) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_only_what_writes_is_asked_to() -> None:
    batches = given()
    assert with_continuations(tiny("bert"), batches, 0) is batches
    alone = [{name: tensor[1:, :1] for name, tensor in batches[1].items()}]
    assert with_continuations(tiny("llama"), alone, 1) is alone  # one token begins nothing
    with pytest.raises(CompressError, match="go on with a text"):
        with_continuations(tiny("bert"), batches, 1)


def test_drawing_is_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model nearly certain of each next token writes that token."""
    model: PreTrainedModel = tiny("gpt2", tie_word_embeddings=False)
    model.lm_head.weight.data *= 500
    batch = with_continuations(model, given()[:1], 1)[1]
    with torch.no_grad():
        likeliest = model(**batch).logits[0, 15:39].argmax(-1)
    assert torch.equal(batch["input_ids"][0, 16:], likeliest)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return decoder_recipe(tmp_path, "llama")


def test_stages_calibrate_on_what_the_model_goes_on_with(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run goes on with the text that it has."""
    gptq = {"backend": "compressed-tensors", "bits": 4, "group_size": 32, "method": "gptq", "samples": 8}
    prune = {"sparsity": 0.5, "samples": 8, "continuations": 2}
    recipe["stages"] = [{"prune": prune}, {"quantize": gptq | {"continuations": 1}}]
    seen: list[int] = []

    def dying(model: PreTrainedModel, batches: list[Any], *args: Any, **options: Any) -> None:
        seen.append(tokens_in(batches))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_compress.stages.prune.compress_blocks", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(parse(recipe), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("hf_compress.stages.quantize.compress_blocks", dying)
        asked: list[int] = []
        patch.setattr(calibration, "write", lambda *a, **k: [asked.append(1), *write(*a, **k)][1:])
        with pytest.raises(KeyboardInterrupt):
            compress(parse(recipe), tmp_path / "out")
        assert len(asked) == 1  # of the quantize stage: pruning had its text
    assert seen == [3 * 8 * 16, 2 * 8 * 16]
    first, second = compress(parse(recipe), tmp_path / "out").facts["stages"]
    assert first["facts"]["calibration_tokens"] == 3 * 8 * 16
    assert (first["facts"]["continuations"], second["facts"]["continuations"]) == (2, 1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "  - calibrated on 384 tokens: rows of text, and 2 continuations of each that the model wrote" in card
    assert "  - calibrated on 256 tokens: rows of text, and a continuation of each that the model wrote" in card


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"prune": {"sparsity": 0.5, "continuations": -1}}, r"no number of times[\s\S]*prune.continuations"),
        (
            {"prune": {"sparsity": 0.5, "continuations": 1, "streaming": True}},
            r"cannot write text[\s\S]*continuations",
        ),
        ({"quantize": {"bits": 4, "method": "gptq", "continuations": 0.5}}, r"continuations"),
    ],
)
def test_what_cannot_be_written_is_named(recipe: dict[str, Any], stage: dict[str, Any], says: str) -> None:
    with pytest.raises(CompressError, match=says):
        parse(recipe | {"stages": [stage]})


def test_the_plan_foresees_who_writes_and_who_reads(recipe: dict[str, Any]) -> None:
    gptq = {"quantize": {"bits": 4, "method": "gptq", "continuations": 1}}

    def refusals(model: dict[str, Any], stage: dict[str, Any]) -> list[str]:
        rows = plan(parse(recipe | {"model": model, "stages": [stage]}))
        return [note for row in rows for note in row.notes if "REFUSED" in note and "continuations" in note]

    assert not refusals(recipe["model"], gptq)
    assert (
        "rounding without a method reads none"
        in refusals(recipe["model"], {"quantize": {"bits": 4, "continuations": 1}})[0]
    )
    bert = {"config": CONFIGS["bert"] | {"model_type": "bert"}, "task": "text-classification"}
    bert["tokenizer"] = recipe["model"]["id"]
    assert "go on with a text" in refusals(bert, gptq)[0]
