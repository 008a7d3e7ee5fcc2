"""A server on 127.0.0.1 that speaks the part of the hub's protocol that downloads need, and fails on request."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


class HubServer:
    """Serves `files` (contents, or paths to read them from) of one dataset repository.

    `faults[name]` is a list of faults of a file, or of "tree" or "info"; each request uses one up: a GET one of cut,
    429, 500, short, corrupt; a HEAD one of head429, head500.
    """

    def __init__(self, repo: str, files: Mapping[str, bytes | Path], small: tuple[str, ...] = ()) -> None:
        self.repo, self.files, self.small = repo, dict(files), small
        self.sha = "a" * 40
        self.entries: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, head=True)

            def do_GET(self) -> None:
                hub.answer(self, head=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def data(self, name: str) -> bytes:
        """A file's content."""
        content = self.files[name]
        return content.read_bytes() if isinstance(content, Path) else content

    def fault(self, name: str, head: bool) -> str:
        """The next fault for this name and kind of request, or an empty string."""
        with self.lock:
            waiting = self.faults.get(name, [])
            if waiting and waiting[0].startswith("head") == head:
                return waiting.pop(0)
            return ""

    def answer(self, to: BaseHTTPRequestHandler, head: bool) -> None:
        """Answers one request, with its fault if one is waiting."""
        path = unquote(urlparse(to.path).path)
        api, files = f"/api/datasets/{self.repo}", f"/datasets/{self.repo}/resolve/{self.sha}/"
        if path.startswith(files) and path[len(files) :] in self.files:
            self.answer_file(to, path[len(files) :], head)
        elif path in (api, f"{api}/revision/main", f"{api}/revision/refs/convert/parquet"):
            body = {"id": self.repo, "sha": self.sha, "siblings": [], "tags": [], "private": False, "downloads": 0}
            self.answer_json(to, "info", {**body, "likes": 0, "_id": "1", "disabled": False, "gated": False})
        elif path == f"{api}/tree/{self.sha}":
            self.answer_json(to, "tree", [self.entry(name) for name in self.files])
        else:
            self.send(to, 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, Any]:
        """The tree's line for a file."""
        if name in self.entries:
            return self.entries[name]
        data = self.data(name)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": git}
        if name not in self.small:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 134}
        if isinstance(self.files[name], Path):
            self.entries[name] = entry  # hashing a large file for each request would take its time
        return entry

    def answer_json(self, to: BaseHTTPRequestHandler, name: str, content: object) -> None:
        self.requests[name] += 1
        fault = self.fault(name, head=False)
        if fault:
            self.send(to, int(fault), b"{}")
        else:
            self.send(to, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, to: BaseHTTPRequestHandler, name: str, head: bool) -> None:
        data, entry = self.data(name), self.entry(name)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha, "Accept-Ranges": "bytes"}
        with self.lock:
            self.requests[("HEAD " if head else "GET ") + name] += 1
        fault = self.fault(name, head)
        if fault in ("429", "500", "head500", "head429"):
            self.send(to, int(fault[-3:]), b"busy", {"Retry-After": "0"}, head)
            return
        begin = 0
        if (wanted := to.headers.get("Range")) and not head:
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            with self.lock:
                self.ranges.append(f"{name} {begin}")
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        if fault == "short":
            body = body[: len(body) // 2]
            headers.pop("Content-Range", None)
        elif fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send(to, 206 if "Content-Range" in headers else 200, body, headers, head, cut=fault == "cut")

    def send(
        self, to: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None,
        head: bool = False, cut: bool = False,
    ) -> None:  # fmt: skip
        """One response; `cut` closes the connection in the middle of its body."""
        to.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            to.send_header(name, value)
        to.end_headers()
        if not head:
            to.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            to.wfile.flush()
            to.close_connection = True
