"""Hubs that do not do what a Hub does, on a port of this machine: for tests of ``--download``.

    with broken_hub("hangs") as address:
        environment = {"HF_ENDPOINT": address}
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOOPBACK = "127.0.0.1"
LONG_SECONDS = 600
SHA = "0" * 40
INFO = (
    b'{"id": "someone/model", "sha": "' + SHA.encode() + b'", "siblings": [{"rfilename": "config.json"}, '
    b'{"rfilename": "model.safetensors"}]}'
)
TREE = (
    b'[{"type": "file", "path": "config.json", "size": 1000000, "oid": "' + SHA.encode() + b'"}, '
    b'{"type": "file", "path": "model.safetensors", "size": 1000000, "oid": "' + SHA.encode() + b'"}]'
)


class Handler(BaseHTTPRequestHandler):
    """Answers as its server's ``way`` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        getattr(self, f"_{self.server.way}")()  # type: ignore[attr-defined]

    do_HEAD = do_GET

    def _hangs(self) -> None:
        self.server.over.wait(LONG_SECONDS)  # type: ignore[attr-defined]

    def _redirects(self) -> None:
        self._answer(302, b"", Location=f"{self.path}?again")

    def _redirects_into_nowhere(self) -> None:
        self._answer(302, b"", Location=f"http://{LOOPBACK}:{_closed_port()}/x")

    def _fails(self) -> None:
        self._answer(500, b"broken")

    def _forbids(self) -> None:
        self._answer(401, b'{"error": "Invalid username or password."}')

    def _is_no_hub(self) -> None:
        self._answer(200, b"<html>log in to this network first</html>")

    def _hangs_in_a_file(self) -> None:
        if "/tree/" in self.path:
            self._answer(200, TREE)
        elif "/api/" in self.path:
            self._answer(200, INFO)
        elif self.command == "HEAD":
            self._answer(200, b"", **{"X-Repo-Commit": SHA, "ETag": '"x"', "X-Linked-Size": "1000000"})
        else:
            self._hangs()

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def broken_hub(way: str) -> Iterator[str]:
    """The address of a Hub that is broken in this way."""
    if way == "refuses":
        yield f"http://{LOOPBACK}:{_closed_port()}"
        return
    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.daemon_threads = True
    server.way, server.over = way, threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
    finally:
        server.over.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.socket.close()
        thread.join()


def _closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    import sys

    with broken_hub(sys.argv[1]) as address:
        print(address, flush=True)
        time.sleep(LONG_SECONDS)
