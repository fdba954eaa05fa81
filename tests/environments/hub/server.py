"""The routes of the Hugging Face Hub that pushing and reading a recipe uses, over files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by name, each a dict of files by path. seen: the requests; refuses: a status for all, or 0."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    refuses: int = 0
    url: str = ""

    def sha(self, repo: str) -> str:
        """A commit's hash: that of all files."""
        listed = [
            (path, hashlib.sha1(data).hexdigest())
            for path, data in sorted(self.repos[repo].items())
        ]
        return hashlib.sha1(repr(listed).encode()).hexdigest()

    def commit(self, repo: str, lines: list[bytes]) -> None:
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.repos[repo][value["path"]]


class Handler(BaseHTTPRequestHandler):
    """Answers for one `Hub`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._refused(path):
            return
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").partition("/revision/")[0]
            repo, _, tree = repo.partition("/tree/")
            if repo not in self.hub.repos:
                self._answer(
                    404,
                    {"error": "no such repository"},
                    {"X-Error-Code": "RepoNotFound"},
                )
            elif tree:
                files = self.hub.repos[repo].items()
                entry = [
                    {
                        "type": "file",
                        "path": p,
                        "size": len(d),
                        "oid": hashlib.sha1(d).hexdigest(),
                    }
                    for p, d in files
                ]
                self._answer(200, entry)
            else:
                siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
                self._answer(
                    200,
                    {
                        "id": repo,
                        "modelId": repo,
                        "sha": self.hub.sha(repo),
                        "siblings": siblings,
                    },
                )
        else:
            self._resolve(body=True)

    def do_POST(self) -> None:
        path, data = (
            urlsplit(self.path).path,
            self.rfile.read(int(self.headers["Content-Length"])),
        )
        if self._refused(path):
            return
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            known = repo in self.hub.repos
            self.hub.repos.setdefault(repo, {".gitattributes": b""})
            self._answer(
                409 if known else 200,
                {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo},
            )
        elif path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(data)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False}
                for name in names
            ]
            self._answer(200, {"files": modes})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            self.hub.commit(repo, data.splitlines())
            sha = self.hub.sha(repo)
            self._answer(
                200,
                {
                    "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
                    "commitOid": sha,
                    "success": True,
                },
            )
        else:
            self._answer(404, {"error": f"no route {path}"})

    def _resolve(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if not body and self._refused(path):
            return
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repo not in self.hub.repos:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif name not in self.hub.repos[repo]:
            self._answer(
                404,
                b"",
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.sha(repo)},
            )
        else:
            content = self.hub.repos[repo][name]
            tags = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": self.hub.sha(repo),
            }
            self._answer(200, content, tags, body=body)

    def _refused(self, path: str) -> bool:
        self.hub.seen.append(f"{self.command} {path}")
        if self.hub.refuses:
            self._answer(
                self.hub.refuses,
                {"error": "not today"},
                {"X-Error-Message": "not today"},
            )
        return bool(self.hub.refuses)

    def _answer(
        self,
        status: int,
        content: object,
        headers: dict[str, str] | None = None,
        body: bool = True,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})
    )
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
