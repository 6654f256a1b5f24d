"""Answers every HTTP request with one line that names its port (``PORT``, default 8080); ``/ticks`` never ends.

Run it as ``python echo_server.py``. It knows nothing of Lictor.
"""

from __future__ import annotations

import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = int(os.environ.get("PORT") or "8080")
TICK_S = 0.05


class Echo(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Say hello, or send a tick every 50 ms until the connection ends."""
        if self.path == "/ticks":
            self._tick()
            return
        body = f"Hello from echo-server on port {PORT}!\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _tick(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"5\r\ntick\n\r\n")
                self.wfile.flush()
                time.sleep(TICK_S)
        except OSError:
            return  # the connection ended

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: the story is told elsewhere."""


class Server(ThreadingHTTPServer):
    """One thread a connection; they do not keep the process from ending."""

    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    print(f"echo-server listens on port {PORT}", flush=True)
    try:
        Server(("127.0.0.1", PORT), Echo).serve_forever()
    except KeyboardInterrupt:
        pass
