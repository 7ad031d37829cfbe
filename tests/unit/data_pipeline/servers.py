"""A web server on loopback that serves a folder: plain files in ranges, and the answers of the Hugging Face Hub."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "chem/zinc"
FORBIDDEN = "forbidden.smi"
_COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path != f"/api/datasets/{REPOSITORY}/paths-info/main":
            return self._send(404, b"{}")
        paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        entries = [self._entry(self.folder / name) for name in paths if (self.folder / name).exists()]
        return self._send(200, json.dumps(entries).encode())

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        api = f"/api/datasets/{REPOSITORY}"
        if path in (api, f"{api}/revision/main"):
            return self._send(200, json.dumps({"id": REPOSITORY, "sha": _COMMIT}).encode(), with_body)
        if path.startswith(f"{api}/tree/main"):
            return self._tree(path.removeprefix(f"{api}/tree/main").strip("/"))
        if path.startswith("/api/"):
            return self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        file = self.folder / re.sub(rf"^/datasets/{REPOSITORY}/resolve/[^/]+/", "/", path).strip("/")
        if not file.is_file():
            return self._send(403 if path == f"/{FORBIDDEN}" else 404, b"", with_body)
        return self._file(file.read_bytes(), with_body)

    def _tree(self, below: str) -> None:
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        if not (self.folder / below).is_dir():
            return self._send(404, b"{}")
        found = sorted((self.folder / below).rglob("*") if recursive else (self.folder / below).iterdir())
        return self._send(200, json.dumps([self._entry(path) for path in found]).encode())

    def _entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "1" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": "2" * 40, "size": path.stat().st_size, "path": name}

    def _file(self, content: bytes, with_body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, with_body)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self._send(416, b"")
        part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._send(206, content[first : last + 1], with_body, part)

    def _send(self, status: int, body: bytes, with_body: bool = True, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", _COMMIT)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder, which is the dataset repository `REPOSITORY` as well. Gives the URL of the server."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
