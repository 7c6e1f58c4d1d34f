"""A hub of a few endpoints on the loopback device: it keeps what is pushed to it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """What arrived."""

    address: str
    calls: list[str] = field(default_factory=list)
    """Method and path of every request."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content of the committed files."""
    cards: list[str] = field(default_factory=list)
    """Model cards it was asked to validate."""
    tokens: set[str] = field(default_factory=set)
    """Authorisations that were shown."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, object]]:
        """Status and JSON of a request."""
        self.calls.append(f"{method} {path}")
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            return 200, {"url": f"{self.address}/someone/{name}", "id": f"someone/{name}"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone", "orgs": [], "auth": {}}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            return 200, {"files": modes}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            oid = "0" * 40
            address = f"{self.address}/someone/model"
            return 200, {"commitUrl": f"{address}/commit/{oid}", "commitOid": oid, "success": True}
        return 404, {"error": "not here"}


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A hub that listens on 127.0.0.1 while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            hub.tokens.add(self.headers.get("Authorization") or "")
            path = self.path.split("?")[0]
            status, value = hub.answer(self.command, path, self.rfile.read(length))
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_POST = do_HEAD = reply

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
