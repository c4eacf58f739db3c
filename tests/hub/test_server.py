"""The test Hub answers the real client as the Hub does."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM

from tests.hub.conftest import BOB, Fresh
from tests.hub.server import Fault, Hub
from tests.models import tiny


@pytest.fixture
def api(online: Hub) -> HfApi:
    made = HfApi()
    made.create_repo("alice/m")
    return made


def test_who_is_who(api: HfApi) -> None:
    assert api.whoami()["name"] == "alice"
    assert api.repo_exists("alice/m")
    assert not api.repo_exists("alice/none")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("alice/m")
    api.create_repo("alice/m", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("bob/m")


def test_folders_go_up_and_come_down(api: HfApi, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "m")
    api.upload_folder(repo_id="alice/m", folder_path=tmp_path / "m")
    found = {f.path: f for f in api.list_repo_tree("alice/m", recursive=True)}
    assert set(found) == {".gitattributes", "config.json", "generation_config.json", "model.safetensors"}
    assert found["model.safetensors"].lfs.size == (tmp_path / "m" / "model.safetensors").stat().st_size
    down = Path(snapshot_download("alice/m"))
    assert (down / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained("alice/m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True))
    before = len(api.list_repo_commits("alice/m"))
    api.upload_folder(repo_id="alice/m", folder_path=tmp_path / "m")
    assert len(api.list_repo_commits("alice/m")) == before


def add(api: HfApi, text: str, path: str = "a.txt", **options: object) -> str:
    made = api.create_commit("alice/m", [CommitOperationAdd(path, text.encode())], commit_message="x", **options)
    return str(made.pr_url or made.oid)


def test_revisions_pull_requests_and_moved_parents(api: HfApi, online: Hub) -> None:
    first = add(api, "1")
    second = add(api, "2", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="412"):
        add(api, "3", parent_commit=first)
    assert add(api, "4", create_pr=True).endswith("/alice/m/discussions/1")
    api.create_branch("alice/m", branch="v1", revision=first)
    add(api, "5", revision="v1")
    read = {r: Path(api.hf_hub_download("alice/m", "a.txt", revision=r)).read_text() for r in (first, "main", "v1")}
    assert read == {first: "1", "main": "2", "v1": "5"}
    assert Path(api.hf_hub_download("alice/m", "a.txt", revision="refs/pr/1")).read_text() == "4"
    assert api.model_info("alice/m").sha == second
    assert [p.ref for p in api.list_repo_refs("alice/m", include_pull_requests=True).pull_requests] == ["refs/pr/1"]


def test_what_is_not_there(api: HfApi) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("alice/m", "none.txt")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("alice/m", "none.txt", revision="v9")


def test_private_is_private(api: HfApi, fresh: Fresh) -> None:
    api.create_repo("alice/p", private=True)
    assert api.model_info("alice/p").private
    ask = "from huggingface_hub import HfApi; HfApi().model_info('alice/p')"
    assert fresh(ask).returncode == 0
    for token in ("", BOB):
        assert "RepositoryNotFoundError" in fresh(ask, token=token).stderr
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=BOB).create_commit("alice/m", [CommitOperationAdd("a", b"a")], commit_message="x")


def test_cards_are_checked(api: HfApi) -> None:
    ModelCard("---\nlicense: mit\n---\n# x").validate()
    for wrong in ("license: nice", "license: other", "base_model: ../x", "pipeline_tag: dreams"):
        with pytest.raises(ValueError, match=r"license|no Hub id|pipeline_tag"):
            ModelCard(f"---\n{wrong}\n---\n# x").validate()
    with pytest.raises(ValueError, match="Invalid metadata"):
        add(api, "---\nlicense: nice\n---\n", "README.md")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/_blobs/", status=500, times=2),
        Fault("PUT", "/_blobs/", drop=100),
        Fault("POST", "/preupload/", drop="before"),
        Fault("POST", "/objects/batch", seconds=0.2),
    ],
    ids=["500", "dropped", "no answer", "slow"],
)
def test_the_client_gets_over_passing_faults(api: HfApi, online: Hub, fault: Fault) -> None:
    online.faults.append(fault)
    add(api, "x" * 10_000, "a.safetensors")
    assert fault.times == 0
    assert online.repos["alice/m"].at("main").files["a.safetensors"].data == b"x" * 10_000


def test_faults_that_last_and_lost_answers(api: HfApi, online: Hub) -> None:
    online.faults.append(Fault("POST", "/commit/", status=500))
    with pytest.raises(HfHubHTTPError, match="500"):
        add(api, "1")
    online.faults.append(Fault("POST", "/commit/", drop="after"))
    with pytest.raises(Exception, match="disconnected"):
        add(api, "1")
    assert online.repos["alice/m"].at("main").files["a.txt"].data == b"1"
    online.faults.append(Fault("GET", "/api/models", status=401))
    with pytest.raises(HfHubHTTPError, match="401"):
        api.model_info("alice/m")
