"""One repository on a loopback server that speaks what the two hubs' clients need, and logs it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "owner/Tiny-1x1M"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Branches and tags, as both hubs call their default one.
REVISIONS = ("main", "master", "v1", COMMIT)


@dataclass
class HubServer:
    """`files` is the repository; `asked` are the files whose content was requested, in order."""

    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    """File and Range header."""
    revisions: set[str] = field(default_factory=set)
    """Those in any request."""
    cut: dict[str, int] = field(default_factory=dict)
    """Break the connection after that many bytes of the file, once."""
    broken: set[str] = field(default_factory=set)
    """Files whose every transfer breaks at once."""
    gated: bool = False

    def forget(self) -> None:
        """Start the log anew."""
        for log in (self.requests, self.asked, self.ranges, self.revisions):
            log.clear()


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[HubServer]:
    hub = HubServer(files)
    handler = type("_Bound", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if match := re.fullmatch(r"/api/v1/models/(\w+/[\w.-]+)/repo(/files)?", path):
            self._modelscope(match[1], query, listing=bool(match[2]))
        elif match := re.fullmatch(r"/openapi/v1/models/(\w+/[\w.-]+)", path):
            self._modelscope_info(match[1])
        elif match := re.fullmatch(
            r"/api/models/(\w+/[\w.-]+)(?:/(?:revision|(tree))/([\w.]+))?", path
        ):
            self._huggingface(match[1], match[3] or "main", listing=bool(match[2]))
        elif match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([\w.]+)/(.+)", path):
            self._huggingface_file(match[1], match[2], match[3])
        else:
            self._json({"error": "no such route"}, 404)

    # --- Hugging Face ---

    def _huggingface(self, repository: str, revision: str, listing: bool) -> None:
        if not self._huggingface_knows(repository, revision):
            return
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.hub.files.items()
        ]
        siblings = [{"rfilename": name} for name in self.hub.files]
        info = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
        self._json(entries if listing else info)

    def _huggingface_file(self, repository: str, revision: str, name: str) -> None:
        if self.hub.gated:
            self._error(403, "GatedRepo", "Access to this model is restricted.")
        elif self._huggingface_knows(repository, revision):
            if name not in self.hub.files:
                self._error(404, "EntryNotFound", "Entry not found")
            else:
                self._content(name, {"X-Repo-Commit": COMMIT})

    def _huggingface_knows(self, repository: str, revision: str) -> bool:
        self.hub.revisions.add(revision)
        if repository != REPOSITORY:
            self._error(401, "RepoNotFound", "Repository not found")
        elif revision not in REVISIONS:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _error(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    # --- ModelScope ---

    def _modelscope(self, repository: str, query: dict[str, str], listing: bool) -> None:
        revision = query.get("Revision", "master")
        self.hub.revisions.add(revision)
        name = query.get("FilePath", "")
        if repository != REPOSITORY or revision not in REVISIONS:
            self._json({"Code": 10010205001, "Message": "模型不存在", "Success": False}, 404)
        elif self.hub.gated:
            self._json({"Code": 10010205002, "Message": "access denied", "Success": False}, 403)
        elif listing:
            files = [
                {
                    "Path": path,
                    "Name": path.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for path, data in self.hub.files.items()
            ]
            self._json({"Code": 200, "Data": {"Files": files}, "Success": True})
        elif name in self.hub.files:
            self._content(name, {})
        else:
            self._json({"Code": 404, "Message": "no such file", "Success": False}, 404)

    def _modelscope_info(self, repository: str) -> None:
        if repository == REPOSITORY:
            self._json({"code": 200, "data": {"id": repository}, "success": True})
        else:
            self._json({"code": "ResourceNotFound", "message": "not found"}, 404)

    # --- both ---

    def _content(self, name: str, headers: dict[str, str]) -> None:
        data = self.hub.files[name]
        begin, status = 0, 200
        end = len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, status = int(match[1]), 206
            end = int(match[2]) + 1 if match[2] else end
            headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            self.hub.ranges.append((name, match[0]))
        headers |= {"ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        body = data[begin:end]
        if self.command == "GET":
            self.hub.asked.append(name)
            if name in self.hub.broken:
                self.close_connection = True
                self._head(status, len(body), headers)
                return
            if name in self.hub.cut:
                self.close_connection = True
                self._head(status, len(body), headers)
                self.wfile.write(body[: self.hub.cut.pop(name)])
                return
        self._send(status, body, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
