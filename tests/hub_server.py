"""A server on this machine that stands for the Hugging Face Hub, with a folder for its repositories.

It speaks what huggingface_hub asks to list, download and upload the files of a model: repositories are
``ROOT/user/repo``; each has one commit, whose name is that of its content's state, and the branch ``main``.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """What the server has, and what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        """Method and path of each request."""
        self.authorised: list[str | None] = []
        """The header `Authorization` of each request."""
        self.refuses = False
        """Whether nobody may write."""
        self.gated: set[str] = set()
        self.private: set[str] = set()

    def files(self, repo: str) -> list[str]:
        folder = self.root / repo
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def commit(self, repo: str) -> str:
        return hashlib.sha1("\n".join(self.files(repo)).encode()).hexdigest()


@contextmanager
def serving(root: Path) -> Iterator[tuple[Hub, str]]:
    """A hub with the repositories in `root`, and its address."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def in_place_of_the_hub(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub asks a server that has the repositories in `root`, and keeps what it downloads in `cache`."""
    from huggingface_hub import constants

    with serving(root) as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_tests")
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, body: bool) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if not (self.hub.root / repo).is_dir():
                self._error(404, "RepoNotFound")
            elif rest[:1] == ["revision"] and rest[1] not in ("main", self.hub.commit(repo)):
                self._error(404, "RevisionNotFound")
            elif rest[:1] == ["tree"]:
                self._json([self._entry(repo, name) for name in self.hub.files(repo)])
            else:
                siblings = [{"rfilename": name} for name in self.hub.files(repo)]
                private = repo in self.hub.private
                self._json({"id": repo, "sha": self.hub.commit(repo), "private": private, "siblings": siblings})
            return
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        path = self.hub.root / repo / name
        if repo in self.hub.gated:
            self._error(403, "GatedRepo")
        elif not path.is_file():
            self._error(404, "EntryNotFound")
        else:
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit(repo)}
            self._send(200, content, headers, body)

    def do_POST(self) -> None:
        parts, content = self._parts(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.refuses:
            self._error(403, "")
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            name = asked["name"] if asked.get("organization") is None else f"{asked['organization']}/{asked['name']}"
            folder, new = self.hub.root / name, not (self.hub.root / name).exists()
            folder.mkdir(parents=True, exist_ok=True)
            if new and (asked.get("private") or asked.get("visibility") == "private"):  # by version of huggingface_hub
                self.hub.private.add(name)
            self._json({"url": f"https://huggingface.co/{name}", "name": name}, 200 if new else 409)
        elif parts == ["api", "validate-yaml"]:  # the front matter of a card
            self._json({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(content)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._json({"files": modes})
        elif parts[4] == "commit":
            repo = "/".join(parts[2:4])
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    path = self.hub.root / repo / entry["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(entry["value"]["content"]))
            oid = self.hub.commit(repo)
            self._json({"commitOid": oid, "commitUrl": f"https://huggingface.co/{repo}/commit/{oid}", "success": True})
        else:
            self._error(404, "")

    def _entry(self, repo: str, name: str) -> dict[str, Any]:
        content = (self.hub.root / repo / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _parts(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.authorised.append(self.headers.get("Authorization"))
        return [unquote(part) for part in path.strip("/").split("/")]

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, True)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, self.command != "HEAD")

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
