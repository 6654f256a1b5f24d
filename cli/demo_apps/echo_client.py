"""Asks the upstream called "backend" (``BACKEND_ADDR``) and prints the answer.

    echo_client.py            one call, as the Go program does
    echo_client.py hold       one call that goes on: prints ``holding``, then ``ended`` when the connection ends
    echo_client.py load       a call every 20 ms, each on a connection of its own, until stdin closes; one line a call

Each line of ``load`` is ``<monotonic seconds> <milliseconds> <answer or !error>``.
"""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time

TIMEOUT_S = 5.0
LOAD_PAUSE_S = 0.02


def call(address: str, path: str = "/") -> str:
    """Return the answer. Raises OSError or http.client.HTTPException when there is none."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode().strip()
        if response.status != 200:
            raise http.client.HTTPException(f"refused: {response.status} {response.reason}: {text}")
        return text
    finally:
        connection.close()


def hold(address: str) -> int:
    """Keep one call alive and tell when it ends."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    connection.request("GET", "/ticks")
    response = connection.getresponse()
    if response.status != 200 or response.readline() != b"tick\n":
        print(f"!refused: {response.status}", flush=True)
        return 1
    print("holding", flush=True)
    try:
        while response.readline():
            pass
    except (OSError, http.client.HTTPException):
        pass
    print(f"ended {time.monotonic():.3f}", flush=True)
    return 0


def load(address: str) -> int:
    """Call again and again until stdin closes."""
    done = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        done.set()

    threading.Thread(target=watch, daemon=True).start()
    while not done.is_set():
        began = time.monotonic()
        try:
            answer = call(address)
        except (OSError, http.client.HTTPException) as error:
            answer = f"!{type(error).__name__}: {error}"
        print(f"{began:.3f} {(time.monotonic() - began) * 1000:.1f} {answer}", flush=True)
        done.wait(LOAD_PAUSE_S)
    return 0


def main() -> int:
    """Run the mode that was asked for."""
    address = os.environ.get("BACKEND_ADDR")
    if not address:
        print("BACKEND_ADDR is not set", file=sys.stderr)
        return 2
    mode = sys.argv[1] if len(sys.argv) > 1 else "once"
    if mode == "hold":
        return hold(address)
    if mode == "load":
        return load(address)
    try:
        print(f"Client received: {call(address)}")
    except (OSError, http.client.HTTPException) as error:
        print(f"Call refused: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
