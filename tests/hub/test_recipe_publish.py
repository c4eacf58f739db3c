"""A recipe's `publish:` section: refused early, done last, and done alone when only it is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_compress import pipeline
from hf_compress.errors import CompressError
from hf_compress.hub import publish
from hf_compress.pipeline import compress
from hf_compress.recipe import parse
from tests.finished import recipe
from tests.hub.server import Fault, Hub


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return recipe("experts", tmp_path) | {"publish": {"repo": "alice/small", "private": True}}


def nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done before")


def test_what_did_not_arrive_is_only_published(
    raw: dict[str, Any], online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, room = tmp_path / "out", tmp_path / ".out.work"
    online.faults.append(Fault("POST", "/commit/", status=500, times=99))
    with pytest.raises(CompressError, match="the same command only publishes it"):
        compress(parse(raw), out)
    assert sorted(path.name for path in room.iterdir()) == ["lock", "unpublished"]
    assert json.loads((out / "hf_compress.json").read_text())["verify"]["logits_difference"] < 1e-3
    online.faults.clear()
    with pytest.raises(CompressError, match="output folder exists"):  # of another recipe
        compress(parse(raw | {"seed": 1}), out)
    for name in ("load_model", "write_expectation", "evaluate"):
        monkeypatch.setattr(pipeline, name, nothing)
    moved = raw | {"publish": {"repo": "alice/renamed", "revision": "v1"}}  # the section may be mended meanwhile
    done = compress(parse(moved), out, overwrite=True)
    assert done.published is not None
    assert done.published.commit == online.repos["alice/renamed"].refs["v1"]
    assert done.facts["published"]["repo"] == "alice/renamed"
    assert not room.exists()
    with pytest.raises(CompressError, match="output folder exists"):
        compress(parse(moved), out)


def test_a_recipe_ends_on_the_hub(raw: dict[str, Any], online: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    done = compress(parse(raw), tmp_path / "out", say=said.append)
    repo = online.repos["alice/small"]
    assert repo.private
    assert done.published is not None
    assert done.published.commit == repo.refs["main"]
    assert said.count("verifying in a fresh process") == 1
    assert said[-1] == "uploading to alice/small"
    assert not (tmp_path / ".out.work").exists()
    files = repo.at("main").files
    assert (
        b"publish:" not in files["recipe.yaml"].data + files["README.md"].data
    )  # those who run it again are not alice
    assert "publish" not in json.loads(files["hf_compress.json"].data)["recipe"]
    assert not publish(tmp_path / "out", "alice/small").changed


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"repo": "a/b/c"}, "no name of a repository"),
        ({"repo": "alice/sm all"}, "no name of a repository"),
        ({"private": True}, "'repo' is needed"),
        ({"repo": "alice/small", "privat": True}, "did you mean 'private'"),
        ({"repo": "alice/small", "token": "x"}, "unknown key 'token'"),
        ({"repo": "alice/small", "create_pr": True, "revision": "v1"}, "against main"),
        ("alice/small", "must be a mapping"),
    ],
)
def test_mistakes_are_found_as_the_recipe_is_read(section: Any, says: str, raw: dict[str, Any]) -> None:
    with pytest.raises(CompressError, match=says):
        parse(raw | {"publish": section})


def test_nobody_works_for_hours_to_be_refused(
    raw: dict[str, Any], online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CompressError, match="stay offline"):
        compress(parse(raw), tmp_path / "out")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CompressError, match="not logged in"):
        compress(parse(raw), tmp_path / "out")
    assert not (tmp_path / ".out.work").exists()
    assert online.log == []


def test_a_folder_too_large_to_open_is_published_by_its_hashes(
    raw: dict[str, Any], online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_fits", lambda *_: False)
    raw["stages"] = [{"prune": {"criterion": "magnitude", "method": "criterion", "sparsity": 0.5, "streaming": True}}]
    out = compress(parse({k: v for k, v in raw.items() if k != "publish"}), tmp_path / "out").folder
    assert publish(out, "alice/small").changed
    (out / "generation_config.json").write_text("{}")
    with pytest.raises(CompressError, match="not as they were saved"):
        publish(out, "alice/small")
