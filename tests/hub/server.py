"""A Hub for tests: the part of its HTTP API that huggingface_hub and transformers use, with faults to inject.

Repositories live in memory; large files go through the LFS protocol (set HF_HUB_DISABLE_XET=1). Start it in a thread
(`Hub.start`) and point HF_ENDPOINT at `url`, or by hand: ``python -m tests.hub.server TOKEN USER``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.cards import problems_of_card

LARGE = (".safetensors", ".onnx", ".bin", ".png")


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]
    parent: str | None


@dataclass
class Repo:
    private: bool
    gated: bool = False  # everybody sees that it is there; only its owner reads its files
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit

    def commit(self, ref: str, message: str, files: dict[str, Blob], parent: str | None) -> Commit:
        known = json.dumps([message, sorted((p, b.oid) for p, b in files.items()), parent, len(self.commits)])
        made = Commit(hashlib.sha1(known.encode()).hexdigest(), message, files, parent)
        self.commits[made.oid], self.refs[ref] = made, made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def history(self, revision: str) -> list[Commit]:
        found, now = [], self.at(revision)
        while now is not None:
            found.append(now)
            now = self.commits.get(now.parent or "")
        return found


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: an answer of `status`; the connection dropped before
    (``drop="before"``), after `bytes` of the body, or ``drop="after"`` the work was done; `seconds` of waiting."""

    method: str
    path: str
    status: int | None = None
    drop: str | int | None = None
    seconds: float = 0.0
    times: int = 1


class Answer(Exception):
    """Ends a request: status, JSON or bytes, headers."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def missing(what: str, status: int = 404, *, code: str = "") -> Answer:
    return Answer(status, {"error": f"{what} not found"}, X_Error_Code=code or f"{what}NotFound")


class Hub:
    """users: token -> name. `log`: (method, path, bytes of the body) of every request that was answered."""

    def __init__(self, users: dict[str, str]) -> None:
        self.users, self.repos, self.blobs = users, dict[str, Repo](), dict[str, bytes]()
        self.faults, self.log = list[Fault](), list[tuple[str, str, int]]()
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_request(self) -> None:
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # a dropped connection is what some tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = (
            f"http://localhost:{self.server.server_port}"  # the client wants large files from another host
        )

    def start(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sent(self, method: str, path: str) -> list[int]:
        """Body sizes of the answered requests whose path matches."""
        return [size for m, p, size in self.log if m == method and re.search(path, p)]

    # one request -----------------------------------------------------------------------------------------------------

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        path, length = unquote(parts.path), int(request.headers.get("Content-Length") or 0)
        fault = self._fault(request.command, path)
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.drop == "before" or isinstance(fault.drop, int):
                request.rfile.read(min(fault.drop, length) if isinstance(fault.drop, int) else 0)
                return _drop(request)
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _chunks(request.rfile)
        else:
            body = request.rfile.read(length)
        self.log.append((request.command, path, len(body)))
        try:
            if fault is not None and fault.status is not None:
                code = {401: "Unauthorized", 403: "Forbidden"}.get(fault.status, "")
                raise Answer(fault.status, {"error": code or "made to fail"}, X_Error_Message=code or "made to fail")
            user = self.users.get((request.headers.get("Authorization") or "").removeprefix("Bearer "))
            with self.lock:
                self._route(request, path, parse_qs(parts.query), body, user)
            raise missing("Entry")
        except Answer as answer:
            if fault is not None and fault.drop == "after":
                return _drop(request)
            _send(request, answer)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _route(self, request: Any, path: str, query: dict[str, list[str]], body: bytes, user: str | None) -> None:
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and request.command in methods:
                answer(self, Call(request, match, query, body, user))

    def repo(self, call: Call, *, write: bool = False) -> Repo:
        name = call.match["repo"]
        repo, owner = self.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and call.user != owner):
            raise missing("Repo", 404 if call.user else 401)
        if write and call.user != owner:
            raise Answer(403 if call.user else 401, {"error": "Forbidden"}, X_Error_Message="no write access")
        return repo

    def commit_of(self, call: Call) -> Commit:
        commit = self.repo(call).at(call.match["rev"])
        if commit is None:
            raise missing("Revision")
        return commit


@dataclass(frozen=True)
class Call:
    request: BaseHTTPRequestHandler
    match: re.Match[str]
    query: dict[str, list[str]]
    body: bytes
    user: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def _send(request: BaseHTTPRequestHandler, answer: Answer) -> None:
    plain = isinstance(answer.body, bytes)
    data = answer.body if plain else json.dumps(answer.body).encode()
    request.send_response(answer.status)
    headers = {"Content-Type": "application/octet-stream" if plain else "application/json"}
    for name, value in (headers | {"Content-Length": str(len(data))} | answer.headers).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


def _drop(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


def _chunks(stream: Any) -> bytes:
    found = b""
    while size := int(stream.readline(), 16):
        found += stream.read(size)
        stream.readline()
    stream.readline()
    return found


# answers -------------------------------------------------------------------------------------------------------------


def whoami(hub: Hub, call: Call) -> None:
    if call.user is None:
        raise Answer(401, {"error": "Invalid credentials in Authorization header"})
    raise Answer(200, {"name": call.user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(hub: Hub, call: Call) -> None:
    if call.user is None:
        raise Answer(401, {"error": "Unauthorized"}, X_Error_Message="Unauthorized")
    asked = call.json
    owner = asked.get("organization") or call.user
    name = f"{owner}/{asked['name']}"
    if owner != call.user:
        raise Answer(403, {"error": "Forbidden"}, X_Error_Message=f"no right to create a model under {owner}")
    if name in hub.repos:
        raise Answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
    repo = hub.repos[name] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
    repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, None)
    raise Answer(200, {"url": f"{hub.url}/{name}", "id": name})


def info(hub: Hub, call: Call) -> None:
    repo = hub.repo(call)
    commit = repo.at(call.match.groupdict().get("rev") or "main")
    if commit is None:
        raise missing("Revision")
    files = [{"rfilename": name} for name in sorted(commit.files)]
    name = call.match["repo"]
    raise Answer(
        200, {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": files, "tags": []}
    )


def entry(path: str, blob: Blob) -> dict[str, Any]:
    large = {"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {}
    return {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)} | large


def tree(hub: Hub, call: Call) -> None:
    commit, under = hub.commit_of(call), call.match["path"] or ""
    found = [entry(p, b) for p, b in sorted(commit.files.items()) if not under or p.startswith(under + "/")]
    if under and not found:
        raise missing("Entry")
    raise Answer(200, found)


def paths_info(hub: Hub, call: Call) -> None:
    commit = hub.commit_of(call)
    asked = call.json["paths"] if call.body.startswith(b"{") else parse_qs(call.body.decode())["paths"]
    raise Answer(200, [entry(p, commit.files[p]) for p in asked if p in commit.files])


def commits(hub: Hub, call: Call) -> None:
    hub.commit_of(call)
    found = hub.repo(call).history(call.match["rev"])
    raise Answer(
        200,
        [
            {"id": c.oid, "title": c.message, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for c in found
        ],
    )


def refs(hub: Hub, call: Call) -> None:
    found = hub.repo(call).refs.items()
    pulls = [{"name": n, "ref": n, "targetCommit": c} for n, c in found if n.startswith("refs/pr/")]
    heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found if not n.startswith("refs/")]
    raise Answer(200, {"branches": heads, "tags": [], "converts": [], "pullRequests": pulls})


def branch(hub: Hub, call: Call) -> None:
    repo = hub.repo(call, write=True)
    if call.match["rev"] in repo.refs:
        raise Answer(409, {"error": "Reference already exists"})
    start = (call.json if call.body else {}).get("startingPoint") or "main"
    commit = repo.at(start)
    if commit is None:
        raise missing("Revision")
    repo.refs[call.match["rev"]] = commit.oid
    raise Answer(200, {})


def preupload(hub: Hub, call: Call) -> None:
    commit = hub.commit_of(call)
    if call.user != call.match["repo"].split("/")[0] and "create_pr" not in call.query:
        hub.repo(call, write=True)
    modes = []
    for file in call.json["files"]:
        blob = commit.files.get(file["path"])
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        modes.append(
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": blob.oid if blob else None}
        )
    raise Answer(200, {"files": modes})


def batch(hub: Hub, call: Call) -> None:
    hub.repo(call, write=True)

    def action(asked: dict[str, Any]) -> dict[str, Any]:
        todo = {"actions": {"upload": {"href": f"{hub.url}/_blobs/{asked['oid']}", "header": {}}}}
        return asked | ({} if asked["oid"] in hub.blobs else todo)

    raise Answer(200, {"transfer": "basic", "objects": [action(o) for o in call.json["objects"]]})


def put_blob(hub: Hub, call: Call) -> None:
    if hashlib.sha256(call.body).hexdigest() != call.match["oid"]:
        raise Answer(400, {"error": "the content is not what its hash says"})
    hub.blobs[call.match["oid"]] = call.body
    raise Answer(200, {})


def get_blob(hub: Hub, call: Call) -> None:
    _content(call, hub.blobs[call.match["oid"]], {})


def commit(hub: Hub, call: Call) -> None:
    pull = "create_pr" in call.query
    repo = hub.repo(call, write=not pull)
    head = hub.commit_of(call)
    lines = [json.loads(line) for line in call.body.splitlines()]
    header, files = lines[0]["value"], dict(head.files)
    if header.get("parentCommit") not in (None, head.oid):
        raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
    for line in lines[1:]:
        kind, value = line["key"], line["value"]
        if kind == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            if value["oid"] not in hub.blobs:
                raise Answer(400, {"error": f"the content of {value['path']} was never uploaded"})
            files[value["path"]] = Blob(hub.blobs[value["oid"]], True)
        else:
            files = {p: b for p, b in files.items() if p != value["path"] and not p.startswith(value["path"] + "/")}
    if problems := problems_of_card(files["README.md"].data.decode() if "README.md" in files else ""):
        raise Answer(400, {"error": "; ".join(problems)})
    number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
    ref = f"refs/pr/{number}" if pull else call.match["rev"]
    made = repo.commit(ref, header["summary"], files, head.oid)
    name = call.match["repo"]
    opened = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"} if pull else {}
    raise Answer(
        200, {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{name}/commit/{made.oid}"} | opened
    )


def validate_yaml(hub: Hub, call: Call) -> None:
    problems = problems_of_card(call.json["content"])
    raise Answer(400 if problems else 200, {"errors": [{"message": p} for p in problems], "warnings": []})


def resolve(hub: Hub, call: Call) -> None:
    found = hub.commit_of(call)
    if hub.repo(call).gated and call.user != call.match["repo"].split("/")[0]:
        raise missing("GatedRepo", 403 if call.user else 401, code="GatedRepo")
    blob = found.files.get(call.match["path"])
    if blob is None:
        raise Answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=found.oid)
    headers = {"X-Repo-Commit": found.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        linked = {"X_Linked_Etag": f'"{blob.oid}"', "X_Linked_Size": str(len(blob.data))}
        away = f"{hub.elsewhere}/_blobs/{blob.oid}"
        raise Answer(302, b"", Location=away, **{k.replace("-", "_"): v for k, v in headers.items()}, **linked)
    _content(call, blob.data, headers)


def _content(call: Call, data: bytes, headers: dict[str, str]) -> None:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("Range") or "")
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    if wanted:
        start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
        raise Answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **named)
    raise Answer(200, data, **named)


_R, _REV = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<rev>refs/pr/\d+|[^/]+)"
_API = rf"/api/models/{_R}"
ROUTES: list[tuple[tuple[str, ...], str, Callable[[Hub, Call], None]]] = [
    (("GET",), "/api/whoami-v2", whoami),
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate_yaml),
    (("GET",), _API, info),
    (("GET",), rf"{_API}/revision/{_REV}", info),
    (("GET",), rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?", tree),
    (("POST",), rf"{_API}/paths-info/{_REV}", paths_info),
    (("GET",), rf"{_API}/commits/{_REV}", commits),
    (("GET",), rf"{_API}/refs", refs),
    (("POST",), rf"{_API}/branch/{_REV}", branch),
    (("POST",), rf"{_API}/preupload/{_REV}", preupload),
    (("POST",), rf"{_API}/commit/{_REV}", commit),
    (("POST",), rf"/{_R}\.git/info/lfs/objects/batch", batch),
    (("PUT",), r"/_blobs/(?P<oid>\w+)", put_blob),
    (("GET", "HEAD"), r"/_blobs/(?P<oid>\w+)", get_blob),
    (("GET", "HEAD"), rf"/{_R}/resolve/{_REV}/(?P<path>.+)", resolve),
]

if __name__ == "__main__":
    served = Hub({sys.argv[1]: sys.argv[2]})
    print(served.url, flush=True)
    served.server.serve_forever()
