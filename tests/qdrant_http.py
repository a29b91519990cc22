"""Qdrant's REST interface in front of the client's local mode.

There is no program of Qdrant's server here. This speaks the part of its interface that `crl store`
needs, as qdrant-client's own models of it say, which refuse unknown fields. It shows that requests
are well formed, and what happens when the server is away. It does not show how a server behaves.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qdrant_client import QdrantClient, models

KEY = "hunter2"


def routes(client: QdrantClient) -> list[tuple[str, str, Callable[..., Any]]]:
    """Return method, pattern of the path, and what answers it."""

    def create(name: str, body: dict[str, Any]) -> Any:
        asked = models.CreateCollection(**body)
        return client.create_collection(
            name, vectors_config=asked.vectors, metadata=body.get("metadata")
        )

    def update(name: str, body: dict[str, Any]) -> Any:
        return client.update_collection(name, metadata=models.UpdateCollection(**body).metadata)

    def add(name: str, field: str, body: dict[str, Any]) -> Any:
        asked = models.DenseVectorNameConfig(**body)
        return client.create_vector_name(name, field, asked)

    def upsert(name: str, body: dict[str, Any]) -> Any:
        return client.upsert(name, points=models.PointsBatch(**body).batch)

    def vectors(name: str, body: dict[str, Any]) -> Any:
        return client.update_vectors(name, points=models.UpdateVectors(**body).points)

    def scroll(name: str, body: dict[str, Any]) -> Any:
        asked = models.ScrollRequest(**body)
        points, after = client.scroll(
            name, asked.filter, limit=asked.limit or 10, with_payload=asked.with_payload or False,
        )  # fmt: skip
        return {"points": [point.model_dump(mode="json") for point in points],
                "next_page_offset": after}  # fmt: skip

    def query(name: str, body: dict[str, Any]) -> Any:
        asked = models.QueryRequest(**body)
        assert asked.params is not None and asked.params.hnsw_ef is not None
        return client.query_points(
            name, query=asked.query, using=asked.using, limit=asked.limit or 10,
            with_payload=asked.with_payload or False,
        )  # fmt: skip

    def read(name: str, body: dict[str, Any]) -> Any:
        asked = models.PointRequest(**body)
        return client.retrieve(
            name, asked.ids, with_payload=asked.with_payload or False,
            with_vectors=asked.with_vector or False,
        )  # fmt: skip

    one = r"/collections/(\w+)"
    return [
        ("GET", "/collections", client.get_collections),
        ("GET", f"{one}/exists", lambda name: {"exists": client.collection_exists(name)}),
        ("GET", one, client.get_collection),
        ("PUT", one, create),
        ("PATCH", one, update),
        ("PUT", rf"{one}/vectors/(\w+)", add),
        ("PUT", f"{one}/points", upsert),
        ("PUT", f"{one}/points/vectors", vectors),
        ("POST", f"{one}/points/scroll", scroll),
        ("POST", f"{one}/points/query", query),
        ("POST", f"{one}/points", read),
        ("POST", f"{one}/points/count", lambda name, _: client.count(name)),
    ]


class QdrantHttp:
    """A server on a free port of the loopback interface, which asks for an API key."""

    def __init__(self) -> None:
        """Make an empty store in memory."""
        self.client = QdrantClient(":memory:", force_disable_check_same_thread=True)
        self.lock = threading.Lock()
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        """Start, at the port of the last start if there was one."""
        table, client_lock = routes(self.client), self.lock

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer()

            do_PUT = do_POST = do_PATCH = do_GET

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                if self.headers.get("api-key") != KEY:
                    self.reply(403, {"status": {"error": "Invalid API key or JWT"}})
                    return
                path = self.path.partition("?")[0]
                for method, pattern, run in table:
                    match = re.fullmatch(pattern, path)
                    if match and method == self.command:
                        given = match.groups() if body is None else (*match.groups(), body)
                        try:
                            with client_lock:
                                found = run(*given)
                        except Exception as error:  # as the server: the reason in the answer
                            self.reply(400, {"status": {"error": str(error)}})
                            return
                        self.reply(200, {"result": _plain(found), "status": "ok", "time": 0.0})
                        return
                self.reply(404, {"status": {"error": f"no {self.command} {path}"}})

            def reply(self, status: int, document: dict[str, Any]) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stop; connections that are open are cut at their next request."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


def _plain(found: Any) -> Any:
    if isinstance(found, list):
        return [_plain(each) for each in found]
    return found.model_dump(mode="json") if hasattr(found, "model_dump") else found
