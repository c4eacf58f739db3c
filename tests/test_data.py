"""Rows as a person gives them -> tokens and labels: chats, prompts, packing, streams, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_compress.calibration import calibration_batches
from hf_compress.data import Data, Prepared, prepare
from hf_compress.errors import CompressError
from hf_compress.pipeline import compress
from hf_compress.recipe import parse
from tests.models import tiny
from tests.training import WORDS, save_reviews, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    words = [*WORDS, "user", "assistant", ":"]
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer", words))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def learned(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    found = prepared.train[row]
    assert len(found["labels"]) == len(found["input_ids"])
    assert all(label in (-100, token) for label, token in zip(found["labels"], found["input_ids"], strict=True))
    return " ".join(tokenizer.convert_ids_to_tokens([t for t in found["labels"] if t != -100]))


def test_only_the_assistants_turns_are_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "good film"), ("assistant", "very bright"), ("user", "bad"), ("assistant", "slow plot")]
    chat = [{"role": role, "content": content} for role, content in turns]
    file = lines(tmp_path / "chats.jsonl", [{"messages": chat}] * 4)
    data = Data(file, messages_column="messages", eval_size=1)
    whole = prepare(data, tokenizer, task="causal-lm")
    assert learned(whole, tokenizer).startswith("user : good film [EOS] assistant : very bright [EOS] user")
    data.completion_only = True
    assert learned(prepare(data, tokenizer, task="causal-lm"), tokenizer) == "very bright [EOS] slow plot [EOS]"
    tokenizer.chat_template = "{% for m in messages[-2:] %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(CompressError, match="rewrites earlier turns"):
        prepare(data, tokenizer, task="causal-lm")


def test_completions_end_with_the_end_of_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = lines(tmp_path / "pairs.jsonl", [{"prompt": "film :", "text": " very dull"}] * 4)
    data = Data(file, prompt_column="prompt", eval_size=1, completion_only=True)
    prepared = prepare(data, tokenizer, task="causal-lm")
    assert learned(prepared, tokenizer) == "very dull [EOS]"
    batch = prepared.collator([prepared.train[0], {k: v[:2] for k, v in prepared.train[1].items()}])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != -100).sum() == 3


def test_the_end_of_text_is_learned_where_it_also_pads(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = None
    file = lines(tmp_path / "texts.jsonl", [{"text": "film [EOS]"}, {"text": "very slow film [EOS]"}] * 3)
    prepared = prepare(Data(file, eval_size=2), tokenizer, task="causal-lm")
    batch = prepared.collator([prepared.train[i] for i in range(4)])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 4


def test_packing_joins_and_cuts_tokens_and_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = lines(tmp_path / "pairs.jsonl", [{"prompt": "film :", "text": " very dull"}] * 5)
    data = Data(file, prompt_column="prompt", eval_size=1, completion_only=True, packing=True, max_length=4)
    prepared = prepare(data, tokenizer, task="causal-lm")
    rows = prepared.train[:]
    assert {len(row) for row in rows["input_ids"]} == {4}
    joined = [t for row in rows["labels"] for t in row if t != -100]
    assert "".join(tokenizer.convert_ids_to_tokens(joined[:4])) == "verydull[EOS][EOS]"


def test_a_stream_gives_the_same_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = lines(
        tmp_path / "texts.jsonl", [{"text": f"film {WORDS[3 + i % 9]}", "source": "ab"[i % 2]} for i in range(60)]
    )
    data = Data(file, filter={"source": "a"}, eval_size=4, streaming=True, max_train_samples=20)
    stream = prepare(data, tokenizer, task="causal-lm")
    everything = prepare(Data(file, filter={"source": "a"}, eval_size=1), tokenizer, task="causal-lm")
    known = {tuple(row) for row in [*everything.train["input_ids"], *everything.eval["input_ids"]]}
    rows = [tuple(row["input_ids"]) for row in stream.train]
    assert len(rows) == 20
    assert len(stream.eval) == 4
    assert set(rows) | {tuple(r) for r in stream.eval["input_ids"]} <= known
    first, again = (calibration_batches(stream, samples=6, vocab_size=20, batch_size=6)[0] for _ in range(2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert len(first["input_ids"]) == 6


def test_a_recipe_trains_from_a_stream(tmp_path: Path) -> None:
    config = tiny("llama").config.to_diff_dict() | {"num_hidden_layers": 1}
    file = lines(tmp_path / "texts.jsonl", [{"text": f"film {WORDS[3 + i % 9]} good plot"} for i in range(60)])
    recipe = {
        "name": "stream",
        "model": {"config": config, "tokenizer": str(save_tokenizer(tmp_path / "tok")), "task": "causal-lm"},
        "data": {"id": file, "eval_size": 8, "streaming": True},
        "stages": [{"train": {"args": {"max_steps": 3, "per_device_train_batch_size": 4}}}, {"prune": {"samples": 8}}],
    }
    said: list[str] = []
    result = compress(parse(recipe), tmp_path / "out", say=said.append)
    assert result.facts["stages"][0]["facts"]["steps"] == 3
    # few tokens are not passed over
    warning = "matrices were refitted on fewer calibration tokens than they have inputs"
    assert warning in (tmp_path / "out" / "README.md").read_text().partition("## Limits")[2]
    assert any(warning in line for line in said)
    # the Trainer switched the cache off
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("text", ["", "text,label\n"])
def test_a_file_without_rows_is_named_as_such(text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "empty.csv").write_text(text)
    with pytest.raises(CompressError, match=r"holds no row[\s\S]*empty.csv"):
        prepare(Data(str(tmp_path / "empty.csv")), tokenizer, task="causal-lm")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CompressError, match=r"holds no row[\s\S]*empty.jsonl"):
        prepare(Data(str(tmp_path / "empty.jsonl")), tokenizer, task="causal-lm")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_column": "texts"}, "no column 'texts'"),
        ({"filter": {"source": "c"}}, "no row is left"),
        ({"split": "test"}, "no split 'test'"),
        ({"completion_only": True}, "needs a prompt_column"),
        ({"messages_column": "text"}, "no chat template"),
        ({"streaming": True}, "number of rows"),
        ({"streaming": True, "eval_split": "train"}, "number of rows"),
        ({"id": "nowhere.csv"}, "cannot read the data"),
    ],
)
def test_bad_data_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = Data(**({"id": str(save_reviews(tmp_path / "reviews.csv"))} | change))
    with pytest.raises(CompressError, match=reason):
        prepare(data, tokenizer, task="causal-lm")


def test_rows_that_cannot_be_read_or_split_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    gaps = lines(tmp_path / "gaps.jsonl", [{"text": "good film"}, {"text": None}] * 8)
    with pytest.raises(CompressError, match=r"\d of \d+ rows hold nothing in the column 'text'"):
        prepare(Data(gaps), tokenizer, task="causal-lm")
    one = lines(tmp_path / "one.jsonl", [{"text": "good film"}])
    with pytest.raises(CompressError, match=r"1 rows cannot be split[\s\S]*data.eval_size"):
        prepare(Data(one), tokenizer, task="causal-lm")
    tokenizer.eos_token = None
    whole = lines(tmp_path / "whole.jsonl", [{"text": "good film"}] * 8)
    with pytest.raises(CompressError, match="no end-of-text token, which packing"):
        prepare(Data(whole, packing=True, max_length=2), tokenizer, task="causal-lm")


def test_classification_refuses_what_is_for_causal_models(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CompressError, match="for causal models"):
        prepare(Data(str(save_reviews(tmp_path / "r.csv")), packing=True), tokenizer, task="text-classification")
