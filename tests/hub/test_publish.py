"""A finished folder reaches the Hub whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_compress.hub
from hf_compress.errors import CompressError
from hf_compress.hub import publish
from hf_compress.pipeline import Result
from tests.finished import KINDS
from tests.hub.conftest import BOB, Fresh
from tests.hub.server import Fault, Hub

Finished = Callable[..., Path]
RENDERED = {"README.md", "hf_compress.json"}


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those that publishing writes again."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in RENDERED)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_one_commit_holds_everything(online: Hub, finished: Finished) -> None:
    folder = finished("classifier")
    before = digests(folder)
    done = Result(folder, {}).push_to_hub("alice/small")
    repo = online.repos["alice/small"]
    head = repo.at("main")
    assert done.changed
    assert (head.oid, head.parent) == (done.commit, repo.history("main")[-1].oid)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(head.files) - {".gitattributes"} == names
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "hf_compress.json"} <= names
    assert {"README.md", "plots/blocks.png", "onnx/model_quantized.onnx", "verify/SHA256SUMS"} <= names
    assert all(head.files[name].data == (folder / name).read_bytes() for name in names - {"hf_compress.json"})
    assert digests(folder) == before


def test_facts_leave_without_the_paths_of_this_machine(trusted: Hub, finished: Finished) -> None:
    folder = finished("experts")
    publish(folder, "alice/small")
    assert str(folder.parent.parent.parent) in (folder / "hf_compress.json").read_text()
    for name, blob in trusted.repos["alice/small"].at("main").files.items():
        assert b"/tmp/" not in blob.data, name
    assert "published" not in json.loads(trusted.repos["alice/small"].at("main").files["hf_compress.json"].data)


def test_a_second_time_there_is_nothing_to_upload(trusted: Hub, finished: Finished) -> None:
    folder = finished("decoder")
    first = publish(folder, "alice/small")
    trusted.log.clear()
    again = publish(folder, "alice/small")
    assert (again.changed, again.commit) == (False, first.commit)
    assert trusted.sent("PUT", "/_blobs/") == trusted.sent("POST", "/commit/") == []


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_anywhere_and_answers_the_same(kind: str, trusted: Hub, finished: Finished, fresh: Fresh) -> None:
    """In one clean process: plain from_pretrained, pipeline, then every snippet of the card as it stands."""
    folder = finished(kind)
    publish(folder, "alice/small")
    card = trusted.repos["alice/small"].at("main").files["README.md"].data.decode()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (3 if kind == "classifier" else 2)
    assert all("alice/small" in snippet for snippet in snippets)
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    with torch.no_grad():
        want = auto.from_pretrained(folder)(torch.tensor([[3, 4, 5, 6]])).logits.float()
    code = (
        f"import torch\nfrom transformers import {auto.__name__} as A, pipeline\n"
        "m, info = A.from_pretrained('alice/small', output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "with torch.no_grad(): print('LOGITS', m(torch.tensor([[3, 4, 5, 6]])).logits.float().flatten().tolist())\n"
        f"ask = pipeline('{'text-classification' if kind == 'classifier' else 'text-generation'}', 'alice/small')\n"
        "print('ANSWER', ask('good film'))\n"
    )
    ran = fresh("\n".join([code, *snippets, "print('SHAPE', tuple(logits.shape))"]))
    assert ran.returncode == 0, ran.stderr[-2000:]
    got = json.loads(next(x for x in ran.stdout.splitlines() if x.startswith("LOGITS"))[7:])
    assert torch.allclose(torch.tensor(got), want.flatten(), rtol=1e-4, atol=1e-4)
    assert "ANSWER [{" in ran.stdout
    assert "SHAPE (1, " in ran.stdout


def test_private_needs_its_owner(trusted: Hub, finished: Finished, fresh: Fresh) -> None:
    publish(finished(), "alice/secret", private=True)
    code = (
        "from transformers import AutoConfig\nimport sys\n"
        f"for who, token in (('alice', None), ('nobody', False), ('bob', {BOB!r})):\n"
        "    try: print(who, AutoConfig.from_pretrained('alice/secret', token=token, cache_dir=who).model_type)\n"
        "    except OSError as error: print(who, str(error).splitlines()[0])\n"
    )
    assert [line.split()[:2] for line in fresh(code).stdout.splitlines()] == [
        ["alice", "deepseek_v3"],
        ["nobody", "alice/secret"],  # ... is not a valid model identifier
        ["bob", "alice/secret"],
    ]


def test_what_was_asked_private_does_not_land_in_public(trusted: Hub, finished: Finished) -> None:
    HfApi().create_repo("alice/small")
    with pytest.raises(CompressError, match="exists and is public"):
        publish(finished(), "alice/small", private=True)
    assert len(trusted.repos["alice/small"].commits) == 1


def test_a_branch_and_a_pull_request_leave_main_alone(trusted: Hub, finished: Finished) -> None:
    folder = finished()
    branch = publish(folder, "alice/small", revision="v1")
    pull = publish(folder, "alice/small", create_pr=True)
    repo = trusted.repos["alice/small"]
    assert set(repo.at("main").files) == {".gitattributes"}
    assert repo.refs["v1"] == branch.commit
    assert repo.refs["refs/pr/1"] == pull.commit
    assert pull.pull_request == f"{trusted.url}/alice/small/discussions/1"
    with pytest.raises(CompressError, match="against main"):
        publish(folder, "alice/small", create_pr=True, revision="v1")


def test_a_pull_request_holds_what_changed(trusted: Hub, finished: Finished) -> None:
    folder = finished()
    publish(folder, "alice/small")
    repo = trusted.repos["alice/small"]
    main = repo.at("main")
    (folder / "README.md").write_text((folder / "README.md").read_text() + PROSE)
    pull = publish(folder, "alice/small", create_pr=True)
    asked = repo.at("refs/pr/1")
    assert pull.changed
    assert (asked.oid, asked.parent) == (pull.commit, main.oid)
    assert repo.at("main") is main
    assert {name for name in asked.files if asked.files[name] != main.files.get(name)} == {"README.md"}
    assert asked.files["README.md"].data.decode().endswith(PROSE)


def test_an_interrupted_upload_goes_on_where_it_stopped(trusted: Hub, finished: Finished) -> None:
    folder = finished("classifier")
    before = digests(folder)
    weights = (folder / "model.safetensors").read_bytes()
    trusted.faults.append(Fault("PUT", hashlib.sha256(weights).hexdigest(), drop=1000, times=10_000))
    with pytest.raises(CompressError, match="what has arrived is not sent again"):
        publish(folder, "alice/small")
    assert len(trusted.repos["alice/small"].commits) == 1
    assert trusted.sent("POST", "/commit/") == []
    arrived = len(trusted.blobs)
    assert arrived >= 1
    assert digests(folder) == before
    trusted.faults.clear()
    trusted.log.clear()
    assert publish(folder, "alice/small").changed
    assert len(weights) in trusted.sent("PUT", "/_blobs/")
    assert len(trusted.sent("PUT", "/_blobs/")) + arrived == len(trusted.blobs)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/commit/", status=500, times=2),
        Fault("POST", "/commit/", drop="after"),
        Fault("POST", "/commit/", drop="before"),
        Fault("PUT", "/_blobs/", status=503, times=3),
        Fault("PUT", "/_blobs/", drop=2000),
        Fault("PUT", "/_blobs/", seconds=1.0),
    ],
    ids=["500 on commit", "answer lost", "commit dropped", "503 on upload", "dropped upload", "slow"],
)
def test_passing_faults_end_in_one_commit(fault: Fault, trusted: Hub, finished: Finished) -> None:
    trusted.faults.append(fault)
    done = publish(finished(), "alice/small")
    repo = trusted.repos["alice/small"]
    assert fault.times == 0
    assert done.changed
    assert [c.oid for c in repo.history("main")] == [done.commit, repo.history("main")[-1].oid]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("POST", "/commit/", status=500, times=99), r"failed \(500\)"),
        (Fault("POST", "/commit/", status=403), "no right to write"),
        (Fault("POST", "/repos/create", status=401), "no right to write"),
        (Fault("POST", "/preupload/", drop="before", times=99), "connection to the Hub failed"),
        (Fault("POST", "/validate-yaml", status=400), "metadata"),
    ],
    ids=["500", "403", "401", "no connection", "400"],
)
def test_lasting_faults_end_in_one_clear_error(fault: Fault, says: str, trusted: Hub, finished: Finished) -> None:
    folder = finished()
    before = digests(folder)
    trusted.faults.append(fault)
    with pytest.raises(CompressError, match=says) as error:
        publish(folder, "alice/small")
    assert error.value.next_step
    assert digests(folder) == before
    assert "alice/small" not in trusted.repos or len(trusted.repos["alice/small"].commits) == 1


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Fault("POST", "/commit/", status=502, times=2), [2, 4]),
        (Fault("POST", "/commit/", status=500, times=99), [2, 4, 8]),
        (Fault("POST", "/commit/", status=400, times=99), []),  # what is refused stays refused
        (Fault("POST", "/commit/", status=409, times=99), []),
        (Fault("PUT", "/_blobs/", status=403, times=99), []),  # the client wraps it as the failure of one file
    ],
    ids=["passes", "lasts", "refused", "conflict", "refused upload"],
)
def test_only_what_may_pass_is_tried_again_and_later_each_time(
    fault: Fault, waits: list[int], trusted: Hub, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[int] = []
    monkeypatch.setattr(hf_compress.hub, "time", types.SimpleNamespace(sleep=slept.append))
    trusted.faults.append(fault)
    with contextlib.suppress(CompressError):
        publish(finished(), "alice/small")
    assert slept == waits
    if fault.method == "POST":
        assert fault.times == (0 if len(waits) == 2 else 99 - len(waits) - 1)


def test_an_upload_for_a_pull_request_is_tried_again(trusted: Hub, finished: Finished) -> None:
    """Only the commit that asks for it is not."""
    trusted.faults.append(Fault("PUT", "/_blobs/", status=503, times=20))
    assert publish(finished(), "alice/small", create_pr=True).pull_request
    assert [name for name in trusted.repos["alice/small"].refs if name.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_lost_pull_request_is_not_opened_twice(trusted: Hub, finished: Finished) -> None:
    trusted.faults.append(Fault("POST", "/commit/", drop="after"))
    with pytest.raises(CompressError, match="connection to the Hub failed"):
        publish(finished(), "alice/small", create_pr=True)
    assert [name for name in trusted.repos["alice/small"].refs if name.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_commit_of_somebody_else_meanwhile_is_reported(
    trusted: Hub, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = hf_compress.hub._operations

    def meanwhile(*given: object) -> object:
        HfApi().create_commit("alice/small", [CommitOperationAdd("theirs.txt", b"x")], commit_message="theirs")
        return gather(*given)

    monkeypatch.setattr(hf_compress.hub, "_operations", meanwhile)
    with pytest.raises(CompressError, match="somebody committed meanwhile"):
        publish(finished(), "alice/small")
    assert set(trusted.repos["alice/small"].at("main").files) == {".gitattributes", "theirs.txt"}


def test_nobody_else_writes_here(trusted: Hub, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    HfApi(token=BOB).create_repo("bob/small")
    with pytest.raises(CompressError, match="no right to write"):
        publish(finished(), "bob/small")
    monkeypatch.delenv("HF_TOKEN")
    trusted.log.clear()
    with pytest.raises(CompressError, match="not logged in"):
        publish(finished("decoder"), "alice/small")
    monkeypatch.setenv("HF_TOKEN", BOB)
    with pytest.raises(CompressError, match="no name of a repository"):
        publish(finished("classifier"), "a/b/c")
    assert [path for _, path, _ in trusted.log if "create" in path] == []


def test_what_does_not_verify_is_not_sent(online: Hub, finished: Finished) -> None:
    folder = finished()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CompressError, match="not as they were saved"):
        publish(folder, "alice/small")
    assert online.log == []


def test_a_card_without_its_weights_is_not_sent(online: Hub, tmp_path: Path) -> None:
    card = Path(__file__).parents[2] / "model_cards" / "quickstart"
    folder = Path(shutil.copytree(card, tmp_path / "quickstart"))
    before = sorted(folder.rglob("*"))
    for verified in (True, False):
        facts = json.loads((folder / "hf_compress.json").read_text())
        (folder / "hf_compress.json").write_text(json.dumps(facts | ({} if verified else {"verify": None})))
        with pytest.raises(CompressError, match=r"no config\.json here"):
            publish(folder, "alice/small")
    assert online.log == []
    assert sorted(folder.rglob("*")) == before


def test_leftovers_of_an_earlier_version_go(trusted: Hub, finished: Finished) -> None:
    publish(finished("classifier"), "alice/small")
    api = HfApi()
    api.create_commit("alice/small", [CommitOperationAdd("notes.txt", b"mine")], commit_message="notes")
    publish(finished("experts"), "alice/small")
    files = trusted.repos["alice/small"].at("main").files
    assert not any(name.startswith("onnx/") for name in files)
    assert "notes.txt" in files


PROSE = "\n## What I found\n\nIt likes films.\n"


def test_prose_is_kept_from_here_and_from_there(trusted: Hub, finished: Finished) -> None:
    folder = finished()
    publish(folder, "alice/small")
    card = trusted.repos["alice/small"].at("main").files["README.md"].data.decode()
    edited = card.replace("tags:\n", "language: en\ntags:\n").replace("## Limits", "## Limits, edited") + PROSE
    api = HfApi()
    api.create_commit("alice/small", [CommitOperationAdd("README.md", edited.encode())], commit_message="prose")
    publish(folder, "alice/small")
    now = trusted.repos["alice/small"].at("main").files["README.md"].data.decode()
    assert PROSE in now
    assert "language: en" in now
    assert "Limits, edited" not in now
    (folder / "README.md").write_text(now.replace("It likes films.", "It likes plots."))  # the one who is here goes on
    publish(folder, "alice/small")
    assert b"It likes plots." in trusted.repos["alice/small"].at("main").files["README.md"].data
    theirs = now.replace("It likes films.", "It hates plots.").encode()
    api.create_commit("alice/small", [CommitOperationAdd("README.md", theirs)], commit_message="prose")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    with pytest.raises(CompressError, match="both here and on the Hub"):
        publish(folder, "alice/small")
