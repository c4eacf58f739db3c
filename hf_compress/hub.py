"""Put a finished folder on the Hub in one commit, after it was verified; and bring one back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of the HTTP library that the client was built on
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_compress.card import FACTS, adopt_prose, note_published, read_facts, save_facts, without_folders, write_card
from hf_compress.errors import CompressError
from hf_compress.hub_errors import explained, may_pass, was_sent
from hf_compress.shippable import shippable
from hf_compress.verification import EXPECTATION, HASHES, require_unchanged, verify, write_hashes

OURS = (
    *("*.safetensors", "*.safetensors.index.json", "onnx/*", "openvino/*", "adapter/*"),
    *("plots/*", "verify/*", ".eval_results/*"),
)
ATTEMPTS = 4  # of the whole upload; what arrived before is not sent again


@dataclass(frozen=True)
class Published:
    """repo, commit: where it is. changed: False when the repository held all of it already. pull_request: its address,
    when one was asked for."""

    repo: str
    commit: str
    changed: bool
    pull_request: str | None = None


@dataclass
class Publish:
    """``publish: {repo: my-org/small, private: true}``"""

    repo: str = field(metadata={"help": "where to: user/name or organisation/name"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    revision: str | None = field(
        default=None, metadata={"help": "branch to commit to, made when there is none; none = main"}
    )
    create_pr: bool = field(default=False, metadata={"help": "open a pull request instead of committing to main"})

    def check(self) -> None:
        """What is wrong whatever the machine."""
        _check_target(self.repo, self.revision, self.create_pr)

    def require_possible(self) -> None:
        """Raise a CompressError where this machine could not publish now: not logged in, or told to stay offline."""
        _require_login(self.repo)
        if is_offline_mode():
            raise CompressError(
                "the Hub's client was told to stay offline",
                where=f"publish.repo: {self.repo}",
                next_step="unset HF_HUB_OFFLINE, or leave `publish:` out and run `hf-compress publish` later",
            )


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Publish with hf_compress",
    check: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Published:
    """``publish("outputs/small", "user/small")``: verify the folder, then commit it to the Hub in one piece.

    The card is written again from the facts, with the prose that a person added to it here or on the Hub; facts and
    recipe go without the paths of this machine. Weights, ONNX files, plots and hashes of an earlier version that are
    no longer made are deleted in the same commit. A dropped connection or a failing server is tried again; the same
    call made later sends only what has not arrived. The token is the client's own (``hf auth login`` or HF_TOKEN).

    Args:
        private: make a new repository private; an existing public one is refused then.
        revision: branch to commit to, made from main when there is none.
        check: False for a folder verified a moment ago, and for a model still in training, which no expectation was
            recorded of; its card says so.

    Raises:
        CompressError: not logged in, no right to write, a commit of somebody else meanwhile, no connection; what
        `verify` or `shippable` refuses; prose changed both here and on the Hub.
    """
    folder = Path(folder)
    _check_target(repo, revision, create_pr)
    facts = read_facts(folder)
    shippable(folder)  # refusals before anything is opened or sent
    _require_login(repo)
    if check:
        _verify(folder, facts, say)
    repo = create(repo, private=private)
    with explained(repo, revision):
        api = HfApi()
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        head = api.model_info(repo, revision=revision).sha
        assert head is not None
        write_card(folder, repo=repo)
        adopt_prose(folder, _card_of(api, repo, head))
        say(f"uploading to {repo}")
        commit = _commit(api, repo, folder, head, revision, create_pr, message)
    note_published(folder, repo)
    return Published(repo, commit.oid, commit.oid != head, commit.pr_url)


def _verify(folder: Path, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """Open the folder in a fresh process; one that was too large for the machine that made it is compared with its
    hashes only, and its card says that nobody opened it."""
    hashed = (folder / HASHES).exists()
    if facts["verify"] is None and facts.get("recipe") and hashed and not (folder / EXPECTATION).exists():
        say("never opened, being larger than its maker's memory: only its hashes are compared")
        require_unchanged(folder)
        return
    say("verifying in a fresh process")
    found = verify(folder)[str(folder)]
    if not hashed:
        write_hashes(folder)
    if facts["verify"] is None:
        save_facts(facts | {"verify": found}, folder / FACTS)


def create(repo: str, *, private: bool = False) -> str:
    """Make the repository unless it is there, and give its full name.

    Raises:
        CompressError: not logged in; no right to; it is there and public, and was asked to be private.
    """
    _require_login(repo)
    with explained(repo, None):
        api = HfApi()
        name: str = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            raise CompressError(
                "the repository exists and is public",
                where=name,
                next_step="make it private on the Hub, or choose another",
            )
    return name


def _check_target(repo: str, revision: str | None, create_pr: bool) -> None:
    """Raise a CompressError for a name the Hub would not take, or a pull request against a branch."""
    with explained(repo, None):
        validate_repo_id(repo)
    if create_pr and revision is not None:
        raise CompressError("a pull request is against main", where="revision", next_step="give one or the other")


def _require_login(repo: str) -> None:
    if get_token() is None:
        raise CompressError(
            "not logged in to the Hub", where=repo, next_step="run `hf auth login`, or set HF_TOKEN, then try again"
        )


def fetch(repo: str, *, revision: str | None = None) -> Path:
    """The files of a published model in the client's cache; nothing that could run as code is downloaded.

    Raises:
        CompressError: no such repository or revision, or no right to read it; no connection and not in the cache.
    """
    with explained(repo, revision):
        try:  # asked first: refused, the client would quietly give what it has cached
            revision = HfApi().model_info(repo, revision=revision).sha
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            pass  # no connection: the cache is what there is
        return Path(
            snapshot_download(repo, revision=revision, ignore_patterns=["*.py", "*.bin", "*.pt", "*.pth", "*.pkl"])
        )


def _card_of(api: HfApi, repo: str, revision: str) -> str | None:
    try:
        return Path(api.hf_hub_download(repo, "README.md", revision=revision)).read_text()
    except RemoteEntryNotFoundError:
        return None


def _operations(api: HfApi, repo: str, folder: Path, head: str) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Every file of the folder, and the deletion of what an earlier version left behind."""
    files = shippable(folder)
    facts = {key: value for key, value in read_facts(folder).items() if key != "published"}
    clean = json.dumps(without_folders(facts), indent=2).encode()
    adds = [CommitOperationAdd(name, clean if name == FACTS else path) for name, path in files.items()]
    there = api.list_repo_files(repo, revision=head)
    stale = [n for n in there if n not in files and any(fnmatch(n, pattern) for pattern in OURS)]
    return [*adds, *(CommitOperationDelete(name) for name in stale)]


def _commit(
    api: HfApi,
    repo: str,
    folder: Path,
    head: str,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> CommitInfo:
    """One commit on top of `head`, tried again while the fault may pass.

    A pull request is not asked for twice: where the answer was lost it may be there.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return api.create_commit(
                repo,
                _operations(api, repo, folder, head),
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
        except (HfHubHTTPError, HTTPError, RuntimeError) as error:
            if attempt == ATTEMPTS or not may_pass(error) or (create_pr and was_sent(error)):
                raise
            time.sleep(2**attempt)
    raise AssertionError
