"""Small apps for tests, each in a thread of its own for as long as it is needed."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

THREAD_ENDS_S = 10.0


class QuietHandler(BaseHTTPRequestHandler):
    """HTTP/1.1 without a word on stderr."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one piece, or each answer waits for a delayed ACK

    def answer(self, status: int, body: bytes, content_type: str = "text/plain") -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(server: socketserver.TCPServer, name: str = "") -> Iterator[int]:
    """Serve; yield the port. `name` is the server's attribute of that name, for its handlers to tell."""
    server.name = name.encode()  # type: ignore[attr-defined]
    server.daemon_threads = True  # type: ignore[attr-defined]
    server.block_on_close = False  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(THREAD_ENDS_S)


def serving_http(handler: type[BaseHTTPRequestHandler]) -> AbstractContextManager[int]:
    """Serve HTTP by a handler, on a port of the system's choice."""
    return serving(ThreadingHTTPServer(("127.0.0.1", 0), handler))
