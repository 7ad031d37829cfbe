"""A server on this machine that answers as the Hugging Face hub does, as far as models are loaded and uploaded."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories by name, each with its branches, and whether it is private.

    Attributes:
        files: content by (repository, branch or commit, path).
        private: by repository.
        token: that it takes to write, and to see what is private.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.private: dict[str, bool] = {}
        self.token = "let-me-in"

    def paths(self, name: str, revision: str) -> list[str]:
        return [path for repository, branch, path in self.files if (repository, branch) == (name, revision)]


@contextmanager
def serve_hub() -> Iterator[tuple[str, Hub]]:
    """-> (address, what it holds)."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, code: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, code: int, error: str) -> None:
            self.answer(code, {"error": error}, {"X-Error-Code": error, "X-Error-Message": error})

        @property
        def is_known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                name, revision = found[1], found[2] or "main"
                if name not in hub.private or (hub.private[name] and not self.is_known):
                    return self.refuse(404, "RepoNotFound")
                siblings = [{"rfilename": each} for each in hub.paths(name, revision)]
                if not siblings:
                    return self.refuse(404, "RevisionNotFound")
                return self.answer(200, {"id": name, "sha": revision, "siblings": siblings})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                sizes = {each: len(hub.files[found[1], found[2], each]) for each in hub.paths(found[1], found[2])}
                files = [{"type": "file", "path": each, "size": size, "oid": each} for each, size in sizes.items()]
                return self.answer(200, files)
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                content = hub.files.get((found[1], found[2], found[3]))
                if content is None:
                    return self.refuse(404, "EntryNotFound")
                tag = hashlib.sha256(content).hexdigest()
                return self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": found[2]})
            return self.refuse(404, "EntryNotFound")

        def do_POST(self) -> None:
            path, body = self.path.partition("?")[0], self.body()
            if not self.is_known:
                return self.refuse(401, "Unauthorized")
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.private.setdefault(name, asked.get("visibility") == "private" or asked.get("private", False))
                return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
            if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
                answers = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                files = [{"path": each["path"], **answers} for each in json.loads(body)["files"]]
                return self.answer(200, {"files": files})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[found[1], found[2], line["value"]["path"]] = content
                url = f"http://{self.headers['Host']}/{found[1]}/commit/{found[2]}"
                return self.answer(200, {"success": True, "commitOid": found[2], "commitUrl": url})
            return self.refuse(404, "EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
