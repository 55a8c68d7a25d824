"""A stand-in of the hub's HTTP on this machine: what a client asks to list and download one repository."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


@dataclass
class Hub:
    """The server; settings may change while it runs. A context manager."""

    files: Mapping[str, bytes]
    gate: str | None = None  # "gated": those without `token` get 403 GatedRepo; "private": 401 RepoNotFound
    token: str = "good"
    cut_after: int | None = None  # bytes after which the first download of a large file breaks off
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    is_closed: bool = False

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Also connections that are kept open get no answer any more."""
        self.is_closed = True
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            if hub.is_closed:
                self.close_connection = True
                return None
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if not path.startswith((f"/api/models/{REPO}", f"/{REPO}/")):
                return self._error(401, "RepoNotFound", "Invalid username or password.")
            if hub.gate and self.headers.get("Authorization") != f"Bearer {hub.token}":
                code, name = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound")}[hub.gate]
                return self._error(code, name, "Access is restricted.")
            if path.startswith("/api/"):
                return self._api(path, with_body)
            return self._file(path.removeprefix(f"/{REPO}/resolve/"), with_body)

        def _api(self, path: str, with_body: bool) -> None:
            rest = path.removeprefix(f"/api/models/{REPO}").strip("/").split("/")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in ("main", COMMIT):
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if rest[0] == "tree":
                listing: Any = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in hub.files]
                listing = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "private": False}
            return self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, with_body)

        def _file(self, path: str, with_body: bool) -> None:
            revision, _, name = path.partition("/")
            if revision not in ("main", COMMIT):
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if name not in hub.files:
                return self._error(404, "EntryNotFound", "Entry not found")
            data = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            first = int(asked.removeprefix("bytes=").split("-")[0]) if (asked := self.headers.get("Range")) else 0
            if asked:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            part = data[first:]
            if with_body and hub.cut_after is not None and len(part) > hub.cut_after:
                self._send(206 if asked else 200, part, headers, with_body, stop=hub.cut_after)
                hub.cut_after = None
                self.close_connection = True
                return None
            return self._send(206 if asked else 200, part, headers, with_body)

        def _error(self, code: int, name: str, message: str) -> None:
            headers = {"X-Error-Code": name, "X-Error-Message": message}
            self._send(code, json.dumps({"error": message}).encode(), headers, self.command == "GET")

        def _send(
            self, code: int, data: bytes, headers: Mapping[str, str], with_body: bool, stop: int | None = None
        ) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data[:stop])

    return Handler
