"""A hub of Hugging Face on the loopback interface, as far as huggingface_hub asks it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".onnx", ".onnx_data", ".h5")
"""Files that are stored elsewhere: the hub redirects to a second server."""


@dataclass
class Repository:
    """Files of a repository at one commit.

    Attributes:
        files: Contents by name.
        commit: Commit, 40 hex digits.
        tags: Other names of the commit.
        token: Token that is needed to see it at all.
        gated: Whether its files, but not its description, need a token.
        cut: Names of files whose transfer ends early.
        wrong: Names of files of which other bytes are sent.
    """

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    tags: tuple[str, ...] = ("main", "v1")
    token: str | None = None
    gated: bool = False
    cut: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path, **more: bytes) -> Repository:
        """A repository with the files of a directory."""
        files = {
            each.relative_to(folder).as_posix(): each.read_bytes()
            for each in folder.rglob("*")
            if each.is_file()
        }
        return cls({**files, **more})


@dataclass(frozen=True)
class Request:
    """A request that a server got."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class FakeHub:
    """The hub and the server of its large files. Use it as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._servers: list[ThreadingHTTPServer] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> FakeHub:
        self.storage = self._serve("storage", self._stored)
        self.endpoint = self._serve("hub", self._answer)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both servers; the hub cannot be reached from then on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
        self._servers, self._threads = [], []

    def downloaded(self) -> list[str]:
        """Names of the files that were transferred."""
        found = [each for each in self.requests if each.method == "GET"]
        names = [
            unquote(each.path).split("/resolve/")[-1] for each in found if each.server == "hub"
        ]
        of_hub = [name.split("/", 1)[1] for name in names if not name.startswith("/")]
        of_storage = [
            unquote(each.path).split("/", 3)[3] for each in found if each.server == "storage"
        ]
        return sorted(of_hub + of_storage)

    def run(self, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """Run Python with a command line, an empty cache in `home`, and this hub."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and not name.lower().endswith("_proxy")
        }
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), **environment}
        return subprocess.run(
            [sys.executable, *command],
            env=kept, capture_output=True, check=False, text=True, timeout=300,
        )  # fmt: skip

    def _serve(self, name: str, answer) -> str:
        log = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {key.lower(): value for key, value in self.headers.items()}
                path = self.path.replace("=True", "=true")  # as older versions write it
                log.append(Request(name, self.command, path, headers))
                status, found, content, sent = answer(self.path, headers)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), **found}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[:sent])
                if sent is not None:
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                """Log nothing on stderr."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        self._servers.append(server)
        self._threads.append(thread)
        return f"http://127.0.0.1:{server.server_address[1]}"

    def _answer(self, target: str, headers: dict[str, str]):
        path = unquote(urlsplit(target).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe(parts[2:], headers)
        repository = self.repositories.get("/".join(parts[:2]))
        if repository is None or parts[2] != "resolve":
            return _refusal(404, "RepoNotFound")
        if repository.gated and "authorization" not in headers:
            return _refusal(401, "GatedRepo")
        if parts[3] not in (repository.commit, *repository.tags):
            return _refusal(404, "RevisionNotFound")
        name = "/".join(parts[4:])
        if name not in repository.files:
            return _refusal(404, "EntryNotFound")
        return self._file(repository, "/".join(parts[:2]), name)

    def _describe(self, parts: list[str], headers: dict[str, str]):
        repository = self.repositories.get("/".join(parts[:2]))
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token and given != repository.token):
            return _refusal(401, "RepoNotFound")
        if parts[2:] and parts[3] not in (repository.commit, *repository.tags):
            return _refusal(404, "RevisionNotFound")
        siblings = []
        for name, content in repository.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": _git_sha1(content)}
            if name.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        name = "/".join(parts[:2])
        document = {
            "_id": "0", "id": name, "modelId": name, "sha": repository.commit, "private": False,
            "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
        }  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode(), None

    def _file(self, repository: Repository, owner: str, name: str):
        content = repository.files[name]
        found = {"X-Repo-Commit": repository.commit}
        if not name.endswith(LARGE):
            sent = bytes(len(content)) if name in repository.wrong else content
            return 200, {**found, "ETag": f'"{_git_sha1(content)}"'}, sent, None
        digest = hashlib.sha256(content).hexdigest()
        found |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        found["Location"] = f"{self.storage}/{owner}/{name}"
        return 302, found, b"", None

    def _stored(self, target: str, headers: dict[str, str]):
        owner, repository, name = unquote(urlsplit(target).path).strip("/").split("/", 2)
        known = self.repositories[f"{owner}/{repository}"]
        content = known.files[name]
        if name in known.wrong:
            content = bytes(len(content))
        sent = len(content) // 2 if name in known.cut else None
        return 200, {"ETag": '"stored"'}, content, sent


def _refusal(status: int, code: str):
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b"", None
