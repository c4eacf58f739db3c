"""What the Hub's client raises: what of it may pass, and what a person is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that the client was built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_compress.errors import CompressError


def may_pass(error: BaseException) -> bool:
    """A server's own failure or a broken connection, also as the cause of the client's upload error; hf_xet reports
    both as plain RuntimeErrors."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    if error.__cause__ is not None and isinstance(error, RuntimeError):
        return may_pass(error.__cause__)
    return isinstance(error, HTTPError | RuntimeError)


def was_sent(error: BaseException) -> bool:
    """Whether the commit itself may have reached the Hub."""
    request = getattr(error, "request", None)
    return request is not None and "/commit/" in str(request.url)


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """The client's errors as what, where and next."""
    where = repo if revision is None else f"{repo}, revision {revision}"
    try:
        yield
    except RevisionNotFoundError as error:
        raise CompressError("no such revision", where=where, next_step="check the branch, tag or commit") from error
    except GatedRepoError as error:  # before its parent, RepositoryNotFoundError
        raise CompressError(
            "gated: its owner gives access to those who ask",
            where=where,
            next_step="open its page on the Hub, ask for access, then log in as who asked: `hf auth login`",
        ) from error
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
