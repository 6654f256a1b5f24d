"""An answer as bytes, in the form that aiohttp gives it: same headers, same order. Pure but for the clock of Date."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

_BODILESS = frozenset({204, 304})


def head_bytes(status: int, reason: str, headers: Mapping[str, str]) -> bytes:
    """Return status line and header lines. Raises ValueError for a value that would end its line."""
    text = f"HTTP/1.1 {status} {reason}\r\n"
    for name, value in headers.items():
        text += name + ": " + value + "\r\n"
    ends = len(headers) + 1
    if text.count("\n") != ends or text.count("\r") != ends or "\x00" in text:
        raise ValueError("a header's name or value holds a line break")
    return (text + "\r\n").encode()


def encode(response: web.StreamResponse, *, closing: bool) -> tuple[bytes, bool]:
    """Return a whole answer and whether the connection ends with it. Raises TypeError for one that is streamed."""
    if not isinstance(response, web.Response) or response.prepared:
        raise TypeError(f"{type(response).__name__} is no whole answer; its route must be marked as streaming")
    body = response.body
    if body is not None and not isinstance(body, bytes | bytearray):
        raise TypeError(f"a body of type {type(body).__name__} is not served here")
    headers = response.headers
    if response.status in _BODILESS:
        body = None
        headers.popall("Content-Length", None)
    elif "Content-Length" not in headers:
        headers["Content-Length"] = str(len(body) if body else 0)
    if body:
        headers.setdefault("Content-Type", "application/octet-stream")
    if "Date" not in headers:
        headers["Date"] = rfc822_formatted_time()
    headers.setdefault("Server", SERVER_SOFTWARE)
    if closing:
        headers.setdefault("Connection", "close")
    ends = headers.get("Connection", "").lower() == "close"
    head = head_bytes(response.status, response.reason, headers)
    return head + body if body else head, ends


def json_ok(body: bytes) -> bytes:
    """Return the answer 200 with JSON, as `encode` gives it for a connection that stays open."""
    lines = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nDate: {rfc822_formatted_time()}\r\n"
    return f"HTTP/1.1 200 OK\r\n{lines}Server: {SERVER_SOFTWARE}\r\n\r\n".encode() + body


def brief(status: int, reason: str, text: str) -> bytes:
    """Return the answer of a connection that is turned away."""
    body = text.encode() + b"\n"
    headers = {
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": str(len(body)),
        "Date": rfc822_formatted_time(),
        "Server": SERVER_SOFTWARE,
        "Connection": "close",
    }
    return head_bytes(status, reason, headers) + body


def failure(status: int) -> web.Response:
    """Return what a handler's own failure is answered with."""
    reason = "504 Gateway Timeout" if status == 504 else "500 Internal Server Error"
    return web.Response(status=status, text=f"{reason}: see the agent's log", content_type="text/plain")
