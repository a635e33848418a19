"""A hub on this machine for the tests: serves model directories the way the hub library asks for
them, and counts what is fetched.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """models: id → directory. fetched: file name → bytes sent of it. on_fetch(file name) is called
    before a whole file is sent.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.on_fetch = lambda name: None
        self.broken: str | None = None  # a file that the hub fails to give
        self.fetched: Counter[str] = Counter()
        self.requests: list[str] = []


def _entry(path: Path, root: Path) -> dict:
    content = path.read_bytes()
    entry = {
        "type": "file",
        "path": path.relative_to(root).as_posix(),
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.suffix == ".safetensors":
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 130,
        }
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            root = hub.models.get("/".join(parts[2:4]))
            if root is None:
                return self._send(404, b"{}")
            wanted = (
                json.loads(body)["paths"]
                if body.startswith("{")
                else parse_qs(body).get("paths", [])
            )
            return self._json(
                [_entry(root / name, root) for name in wanted if (root / name).is_file()]
            )

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self._api(parts)
            root = hub.models.get("/".join(parts[:2]))
            if root is None or parts[2] != "resolve" or not (root / "/".join(parts[4:])).is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._file(root / "/".join(parts[4:]), root, with_body)

        def _api(self, parts: list[str]) -> None:
            root = hub.models.get("/".join(parts[2:4]))
            if root is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = sorted(path for path in root.rglob("*") if path.is_file())
            if "tree" in parts:
                return self._json([_entry(path, root) for path in files])
            siblings = []
            for path in files:
                entry = _entry(path, root)
                sibling = {
                    "rfilename": entry["path"],
                    "size": entry["size"],
                    "blobId": entry["oid"],
                }
                if "lfs" in entry:
                    sibling["lfs"] = {
                        "sha256": entry["lfs"]["oid"],
                        "size": entry["size"],
                        "pointerSize": 130,
                    }
                siblings.append(sibling)
            name = "/".join(parts[2:4])
            return self._json(
                {
                    "_id": "1",
                    "id": name,
                    "modelId": name,
                    "sha": REVISION,
                    "private": False,
                    "tags": [],
                    "siblings": siblings,
                }
            )

        def _file(self, path: Path, root: Path, with_body: bool) -> None:
            content, entry = path.read_bytes(), _entry(path, root)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
            status = 200
            if self.headers.get("Range", "").startswith("bytes="):
                first, _, last = self.headers["Range"][6:].partition("-")
                end = min(int(last) + 1 if last else len(content), len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                content, status = content[int(first) : end], 206
            if with_body and status == 200:
                hub.on_fetch(path.name)
                if path.name == hub.broken:
                    self._send(500, b"")
                    return
            if with_body:
                hub.fetched[path.name] += len(content)
            self._send(status, content, headers, with_body)

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(
            self,
            status: int,
            content: bytes,
            headers: dict[str, str] | None = None,
            with_body: bool = True,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@contextmanager
def serve(models: dict[str, Path]):
    """Yields (hub, address) while it runs."""
    hub = Hub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
