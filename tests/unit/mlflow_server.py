"""A real MLflow server, and a gate before it that can be made to fail in the ways that servers fail."""

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hmoe_ds.training.launching.node import free_port

START_SECONDS = 120


class MlflowServer:
    """`mlflow server` with its data in a folder, which outlives the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def launch(self) -> None:
        """Start it; it will answer some seconds later."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        unwanted = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | unwanted, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.uri + "/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("mlflow server does not answer:\n" + (self._folder / "server.log").read_text()[-3000:])

    def stop(self) -> None:
        """End it with its workers, at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Gate:
    """Stands before a server. `mode` says what it does with a request:

    - `"open"`: hand it on
    - `"hang"`: take it and do not answer
    - `"no artifacts"`: hand it on, unless it brings an artifact
    - a number: answer with this status

    Of the requests in `lose`, named by a part of their paths, the first one is handed on and its answer lost.
    """

    def __init__(self, server: MlflowServer) -> None:
        self.mode: str | int = "open"
        self.lose: set[str] = set()
        self.requests: list[str] = []  # paths, of all requests so far
        self._ending = threading.Event()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _handle(self) -> None:
                mode = gate.mode
                gate.requests.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if mode == "hang":
                    while gate.mode == "hang" and not gate._ending.wait(0.05):
                        pass
                    self.close_connection = True
                    return
                if mode == "no artifacts" and "artifacts" in self.path:
                    mode = 501
                if isinstance(mode, int):
                    self._reply(mode, b"the gate is shut")
                    return
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k not in ("Host", "Connection")}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                lost = [part for part in gate.lose if part in self.path]
                if lost:
                    gate.lose -= set(lost)
                    self.close_connection = True
                    return
                self._reply(answer.status, content)

            def _reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                with contextlib.suppress(ConnectionError):  # a client that has stopped waiting
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
