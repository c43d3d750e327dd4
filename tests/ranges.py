"""An HTTP server of one folder that answers ranges, counts what it serves, and misbehaves on demand."""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Answer:
    """What is about to be sent; a fault changes it."""

    def __init__(self, number: int, start: int, content: bytes, size: int) -> None:
        self.number = number  # of the request, from 1 on
        self.status, self.start, self.size = 206, start, size
        self.content = content
        self.headers = {
            "Content-Range": f"bytes {start}-{start + len(content) - 1}/{size}",
            "Content-Length": str(len(content)),
            "ETag": '"one"',
            "Last-Modified": "Sun, 22 Nov 2026 10:00:00 GMT",
        }
        self.pause = 0.0  # between bytes of the body
        self.drops = False  # closes without a word


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Ranges

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        start, last = map(int, RANGE.fullmatch(self.headers["Range"]).groups())
        if not path.exists() or start >= path.stat().st_size:
            self.send_error(416 if path.exists() else 404)
            return
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(last + 1 - start)
        self.server.requests.append((self.path, start, start + len(content)))
        answer = Answer(len(self.server.requests), start, content, path.stat().st_size)
        self.server.fault(answer)
        self.answer(answer)

    def answer(self, answer: Answer):
        if answer.drops:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        step = 1 if answer.pause else max(1, len(answer.content))
        for at in range(0, len(answer.content), step):
            self.wfile.write(answer.content[at : at + step])
            time.sleep(answer.pause)
        if len(answer.content) != int(answer.headers.get("Content-Length", -1)):
            self.close_connection = True


class Ranges(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "https" if context else "http"
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.folder = folder
        self.requests: list[tuple[str, int, int]] = []
        self.connections = 0
        self.fault = lambda answer: None

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is what some tests are about

    def url(self, name: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}/{name}"

    @property
    def bytes_served(self) -> int:
        return sum(stop - start for _, start, stop in self.requests)


@contextmanager
def serving(folder: Path, context: ssl.SSLContext | None = None) -> Iterator[Ranges]:
    with Ranges(folder, context) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
