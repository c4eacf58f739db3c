"""Put a finished folder on the Hub in one commit, after it was verified; and bring one back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that the client was built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_compress.card import FACTS, adopt_prose, note_published, read_facts, save_facts, without_folders, write_card
from hf_compress.errors import CompressError
from hf_compress.shippable import shippable
from hf_compress.verification import HASHES, verify, write_hashes

OURS = ("*.safetensors", "*.safetensors.index.json", "onnx/*", "adapter/*", "plots/*", "verify/*", ".eval_results/*")
ATTEMPTS = 4  # of the whole upload; what arrived before is not sent again


@dataclass(frozen=True)
class Published:
    """repo, commit: where it is. changed: False when the repository held all of it already. pull_request: its address,
    when one was asked for."""

    repo: str
    commit: str
    changed: bool
    pull_request: str | None = None


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
        check: False for a model still in training, which no expectation was recorded of; its card says so.

    Raises:
        CompressError: not logged in, no right to write, a commit of somebody else meanwhile, no connection; what
        `verify` or `shippable` refuses; prose changed both here and on the Hub.
    """
    folder = Path(folder)
    if create_pr and revision is not None:
        raise CompressError("a pull request is against main", where="revision", next_step="give one or the other")
    facts = read_facts(folder)
    shippable(folder)  # refusals before anything is opened or sent
    _require_login(repo)
    if check:
        say("verifying in a fresh process")
        if not (folder / HASHES).exists():
            write_hashes(folder)
        found = verify(folder)[str(folder)]
        if facts["verify"] is None:
            save_facts(facts | {"verify": found}, folder / FACTS)
    repo = create(repo, private=private)
    with _explained(repo, revision):
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


def create(repo: str, *, private: bool = False) -> str:
    """Make the repository unless it is there, and give its full name.

    Raises:
        CompressError: not logged in; no right to; it is there and public, and was asked to be private.
    """
    _require_login(repo)
    with _explained(repo, None):
        api = HfApi()
        name: str = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            raise CompressError(
                "the repository exists and is public",
                where=name,
                next_step="make it private on the Hub, or choose another",
            )
    return name


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
    with _explained(repo, revision):
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
            if attempt == ATTEMPTS or not _may_pass(error) or (create_pr and _was_sent(error)):
                raise
            time.sleep(2**attempt)
    raise AssertionError


def _may_pass(error: BaseException) -> bool:
    """A server's own failure or a broken connection, also as the cause of the client's upload error; hf_xet reports
    both as plain RuntimeErrors."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    if error.__cause__ is not None and isinstance(error, RuntimeError):
        return _may_pass(error.__cause__)
    return isinstance(error, HTTPError | RuntimeError)


def _was_sent(error: BaseException) -> bool:
    """Whether the commit itself may have reached the Hub."""
    request = getattr(error, "request", None)
    return request is not None and "/commit/" in str(request.url)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """The client's errors as what, where and next."""
    where = repo if revision is None else f"{repo}, revision {revision}"
    try:
        yield
    except RevisionNotFoundError as error:
        raise CompressError("no such revision", where=where, next_step="check the branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise CompressError(
            "no such repository, or it is private and you may not see it",
            where=where,
            next_step="check the name; for a private one log in: `hf auth login`",
        ) from error
    except HFValidationError as error:
        raise CompressError(
            "no name of a repository on the Hub",
            where=repr(repo),
            next_step="give it as user/name or organisation/name",
        ) from error
    except HfHubHTTPError as error:
        raise _of_status(error, where) from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RuntimeError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # the client wraps what an upload of one file met
            raise _of_status(error.__cause__, where) from error
        raise CompressError(
            f"the connection to the Hub failed and did not come back: {str(error).splitlines()[0]}",
            where=where,
            next_step="nothing was changed unless all of it was; try again: what has arrived is not sent again",
        ) from error
    except ValueError as error:
        if "metadata" not in str(error):
            raise
        raise CompressError(str(error), where=f"{where}: README.md", next_step="mend the card's metadata") from error


def _of_status(error: HfHubHTTPError, where: str) -> CompressError:
    status = error.response.status_code if error.response is not None else 0
    if status == 412:
        what, then = "somebody committed meanwhile", "look at what changed there, then publish again"
    elif status in (401, 403):
        what, then = (
            "no right to write there",
            "log in as somebody who has: `hf auth login`, with a token that may write",
        )
    elif status >= 500:
        what, then = (
            f"the Hub failed ({status}) and did not recover",
            "try again later: what has arrived is not sent again",
        )
    else:
        said = getattr(error, "server_message", None) or str(error).splitlines()[0]
        what, then = f"the Hub refused ({status}): {said}", "mend that, then publish again"
    return CompressError(what, where=where, next_step=then)
