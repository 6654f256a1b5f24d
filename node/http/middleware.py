"""Around every handler: who may ask, and errors made into Consul's plain texts."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from node.agent.definitions import BadDefinition
from node.errors import BadRequest, Busy, NodeError, NoLeader, TimedOut, UnknownOutcome
from node.http.context import CONTEXT
from node.http.errors import HttpError
from node.http.front.repeats import Parked
from node.http.options import check_datacenter
from node.http.writing import REQUEST_ID_HEADER

log = logging.getLogger("lictor.http")

Next = Callable[[web.Request], Awaitable[web.StreamResponse]]
UNKNOWN_PATH = "Invalid URL path: not a recognized HTTP API endpoint"
_LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost"})


def plain_text(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    """Return an error's answer."""
    return web.Response(
        text=text, status=status, headers=CIMultiDict(headers or {}), content_type="text/plain", charset="utf-8"
    )


@web.middleware
async def guard(request: web.Request, handler: Next) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer; refuse what a browser was tricked into."""
    ctx = request.app[CONTEXT]
    try:
        # Where tokens are asked for, a browser that was tricked has none to give; who shows none is judged there.
        refusal = "" if ctx.access is not None else foreign(request, ctx.options.allowed_hosts)
        if refusal:
            return plain_text(403, refusal)
        if "dc" in request.query:
            check_datacenter(request.query, ctx.agent.options.datacenter)
        return await handler(request)
    except Parked:
        raise
    except HttpError as error:
        return plain_text(error.status, error.text, error.headers)
    except web.HTTPException as error:
        if isinstance(error, web.HTTPMethodNotAllowed):
            text = f"method {request.method} not allowed"
            return plain_text(405, text, {"Allow": ",".join(sorted(error.allowed_methods))})
        text = UNKNOWN_PATH if error.status == 404 else error.text or error.reason
        return plain_text(error.status, text)
    except BadDefinition as error:
        return plain_text(400, str(error))
    except NodeError as error:
        return node_error(error)
    except (ConnectionError, TimeoutError):
        raise
    except msgspec.ValidationError as error:
        log.exception("%s %s met a value of an unexpected shape", request.method, request.path)
        return plain_text(500, f"an answer had an unexpected shape: {error}; please report this")
    except Exception:
        # The last resort: the client gets a text, the log gets the traceback, other requests go on.
        log.exception("%s %s failed", request.method, request.path)
        return plain_text(500, "internal error: see the agent's log")


def node_error(error: NodeError) -> web.Response:
    """Return the answer for an error of the backend."""
    text = str(error)
    if isinstance(error, UnknownOutcome):
        again = f"A retry with the same {REQUEST_ID_HEADER} header is safe"
        return plain_text(500, f"{text}. {again}", {"X-Lictor-Outcome": "unknown"})
    if isinstance(error, NoLeader):
        return plain_text(500, text if text.startswith("No cluster leader") else f"No cluster leader: {text}")
    if isinstance(error, Busy):
        return plain_text(429, text, {"Retry-After": "1"})
    if isinstance(error, TimedOut):
        return plain_text(500, text)
    if isinstance(error, BadRequest):
        return plain_text(400, text)
    return plain_text(error.http_status, text)


def foreign(request: web.Request, allowed: frozenset[str]) -> str:
    """Return why a request is refused as one that a web page may have sent, or an empty text."""
    return foreign_head(request.method, request.headers, allowed)


def foreign_head(method: str, headers: Mapping[str, str], allowed: frozenset[str]) -> str:
    """As `foreign`, of what a request's head alone tells.

    A page on another origin can make a browser send requests to loopback, and a name it controls may resolve to
    127.0.0.1 (DNS rebinding). The first shows in Origin, the second in Host.
    """
    host = _name(headers.get("Host", ""))
    if host and not _trusted(host, allowed):
        return f"Host {host!r} is not a name of this API; use its address, or allow the name in the configuration"
    origin = headers.get("Origin", "")
    writes = method not in ("GET", "HEAD", "OPTIONS")
    if origin and writes and not _own_origin(urlsplit(origin).hostname or "", host, allowed):
        return f"writes from the web origin {origin!r} are not accepted"
    if headers.get("Sec-Fetch-Site", "") == "cross-site" and writes:
        return "cross-site writes are not accepted"
    return ""


def _name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") <= 1 else host


@lru_cache(maxsize=256)
def _trusted(host: str, allowed: frozenset[str]) -> bool:
    """Whether a Host may be asked: an address cannot be rebound, a name can."""
    return _known(host, allowed) or _address(host) is not None


def _own_origin(origin: str, host: str, allowed: frozenset[str]) -> bool:
    """Whether a page of this origin is one of ours: served from this host, under the name it is asked by."""
    address = _address(origin)
    return _known(origin, allowed) or (address is not None and (address.is_loopback or origin == host))


def _known(host: str, allowed: frozenset[str]) -> bool:
    host = host.rstrip(".").lower()
    return host in _LOOPBACK_NAMES or host in allowed


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
