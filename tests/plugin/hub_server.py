"""A loopback stand-in for the Hub's model API: repositories in memory, commits counted, failures on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

SECONDS = 240  # the server ends by itself if nobody does it
STALL = -1  # as a status: no answer until the test says so
LARGEST = 64 << 20  # bytes of one request


@dataclass
class Repo:
    """Files and history of one repository: every commit is ``{path: bytes}`` added and a list of paths removed."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[dict[str, bytes], list[str]]] = field(default_factory=list)
    branches: list[str] = field(default_factory=lambda: ["main"])
    private: bool = False
    uploads: list[str] = field(default_factory=list)  # sha256 of what was sent through LFS, each time it was

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


class FakeHub:
    """The server, as a context manager; ``url`` is what ``HF_ENDPOINT`` gets.

    ``fail[repo] = (method, text, status)`` refuses requests for ``repo`` whose path or body holds ``text``, with a fourth
    entry so many times. A status of 0 cuts the connection, ``STALL`` answers only when ``released`` is set. Refusals repeat
    the token they were sent, as no server should. ``requests`` counts all calls.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[tuple[str, str], bytes] = {}  # what went through LFS, by repository and sha256
        self.fail: dict[str, tuple] = {}
        self.stalled, self.released = threading.Event(), threading.Event()
        self.requests = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self._timer = threading.Timer(SECONDS, self._server.shutdown)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers the calls a push and a pull make; anything else is 404, as from the Hub."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""

    def do_GET(self) -> None:
        self.body = self._read()
        path = self.path.split("?")[0]
        self.hub.requests += 1
        for repo, (method, text, status, *times) in list(self.hub.fail.items()):
            about = repo in self.path or f'"{repo.split("/")[1]}"' in self.body.decode(errors="replace")[:400]
            if method == self.command and about and text in self.path:
                if times:
                    self.hub.fail[repo] = (method, text, status, times[0] - 1)
                    if times[0] == 1:
                        del self.hub.fail[repo]
                return self._refuse(status)
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *found.groups())
        self._reply({"error": "not here"}, 404)

    do_HEAD = do_POST = do_PUT = do_GET

    def _refuse(self, status: int) -> None:
        if status == STALL:
            self.hub.stalled.set()
            self.hub.released.wait(SECONDS)
        if status in (0, STALL):
            self.close_connection = True
            return
        self._reply({"error": f"refused with {status} for {self.headers.get('Authorization')}"}, status)

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        known = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(private=wanted.get("visibility") == "private"))
        self._reply({"url": f"{self.hub.url}/{name}", "id": name, "name": name}, 409 if known else 200)

    def branch(self, repo: str, name: str) -> None:
        self.hub.repos[repo].branches.append(name)
        self._reply({})

    def validate(self) -> None:
        self._reply({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if revision not in self.hub.repos[repo].branches:
            return self._no_revision()
        mode = {True: "lfs", False: "regular"}
        names = [file["path"] for file in json.loads(self.body)["files"]]
        files = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
        for entry in files:
            held = self.hub.repos[repo].files.get(entry["path"])
            if held is not None:
                git = hashlib.sha1(b"blob %d\0" % len(held) + held)
                entry["oid"] = git.hexdigest() if entry["uploadMode"] == "regular" else hashlib.sha256(held).hexdigest()
        self._reply({"files": files})

    def _no_revision(self) -> None:
        self._reply({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})

    def batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if (repo, entry["oid"]) not in self.hub.large:
                entry["actions"] = {
                    action: {"href": f"{self.hub.url}/large/{action}/{repo}/{entry['oid']}"}
                    for action in ("upload", "verify")
                }
        self._reply({"transfer": "basic", "objects": objects})

    def upload(self, repo: str, oid: str) -> None:
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.hub.large[repo, oid] = self.body
            self.hub.repos[repo].uploads.append(oid)
        self._reply({}, 200 if right else 400)

    def verify(self, repo: str, oid: str) -> None:
        self._reply({}, 200 if (repo, oid) in self.hub.large else 404)

    def commit(self, repo: str, revision: str) -> None:
        if revision not in self.hub.repos[repo].branches:
            return self._no_revision()
        added, removed = {}, []
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                added[value["path"]] = self.hub.large[repo, value["oid"]]
            elif entry["key"] == "deletedFile":
                removed.append(value["path"])
        held = self.hub.repos[repo]
        held.commits.append((added, removed))
        held.files = {n: data for n, data in held.files.items() if n not in removed} | added
        self._reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{held.sha}", "commitOid": held.sha, "success": True})

    def info(self, repo: str, revision: str | None) -> None:
        held = self.hub.repos.get(repo)
        if held is None:
            return self._reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, *held.branches, held.sha):
            return self._no_revision()
        front = held.files.get("README.md", b"").decode().split("---\n")
        card = yaml.safe_load(front[1]) if len(front) > 2 else None
        siblings = [{"rfilename": name} for name in held.files]
        self._reply(
            {"id": repo, "modelId": repo, "sha": held.sha, "siblings": siblings, "private": held.private, "cardData": card}
        )

    def tree(self, repo: str, revision: str) -> None:
        if revision not in [*self.hub.repos[repo].branches, self.hub.repos[repo].sha]:
            return self._no_revision()
        files = self.hub.repos[repo].files.items()
        self._reply([{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in files])

    def resolve(self, repo: str, name: str) -> None:
        held = self.hub.repos.get(repo, Repo())
        if name not in held.files:
            return self._reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data = held.files[name]
        self._reply(data, 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": held.sha})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(min(int(self.headers.get("Content-Length") or 0), LARGEST))
        body = b""
        while (size := int(self.rfile.readline().split(b";")[0], 16)) and len(body) < LARGEST:
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in {"Content-Length": str(len(data)), "Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


_REPO = r"([^/]+/[^/]+)"
ROUTES = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate,
    rf"POST /api/models/{_REPO}/branch/(.+)": _Handler.branch,
    rf"POST /api/models/{_REPO}/preupload/([^/]+)": _Handler.preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    rf"PUT /large/upload/{_REPO}/(\w+)": _Handler.upload,
    rf"POST /large/verify/{_REPO}/(\w+)": _Handler.verify,
    rf"POST /api/models/{_REPO}/commit/(.+)": _Handler.commit,
    rf"GET /api/models/{_REPO}(?:/revision/(.+))?": _Handler.info,
    rf"GET /api/models/{_REPO}/tree/([^/?]+)": _Handler.tree,
    rf"(?:GET|HEAD) /{_REPO}/resolve/[^/]+/(.+)": _Handler.resolve,
}
