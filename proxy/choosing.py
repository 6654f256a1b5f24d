"""What a request needs to find its instance, be it HTTP/1.1 or HTTP/2: the plan's word on it, and the choice."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from proxy.balancer import Instance, Key
from proxy.balancing.routing import Asked, Chooses, Field, Way, change_lines, hash_request
from proxy.errors import StreamRefused
from proxy.http.head import RequestHead, ResponseHead
from proxy.mux import frames
from proxy.mux.core import MuxStream
from proxy.relay import SocketChannel
from proxy.stream import Channel
from raftstate.model.plan import HeaderChange

if TYPE_CHECKING:
    from proxy.outbound import Upstream as Service

_INSTANCE_FAULTS = frozenset({frames.APP_DOWN, frames.TIMED_OUT})
_AVOIDABLE = frozenset({frames.DRAINING, frames.NOT_READY, frames.TOO_MANY})


class View(NamedTuple):
    """A request as routes see it."""

    method: bytes
    target: bytes
    fields: Sequence[Field]


class RequestAim:
    """What the plan says of one request, and by what it is hashed."""

    __slots__ = (
        "_changes", "_way", "attempts_max", "destination", "edits", "hashed", "idle_timeout_s", "request_timeout_s",
        "retry_grpc", "retry_resets", "retry_statuses",
    )  # fmt: skip

    def __init__(self, service: Service, way: Way, asked: Asked, client: Channel) -> None:
        self._way = way
        self.request_timeout_s = way.request_timeout_s
        self.idle_timeout_s = way.idle_timeout_s
        self.attempts_max = way.attempts_max
        self.retry_statuses = way.retry_statuses
        self.retry_grpc = way.retry_grpc
        self.retry_resets = way.retry_resets
        self.hashed: int | None = None
        self.destination: Chooses = way.destination
        self._changes = way.response_changes
        if policies := way.destination.hash_policies:
            self.hashed, cookies = hash_request(policies, asked, source_of(client), service.random)
            for cookie in cookies:
                self._changes = (*self._changes, HeaderChange(add={"Set-Cookie": cookie}))
        self.edits = bool(self._changes)

    # HTTP/1.1

    def prepare(self, head: RequestHead) -> bytes:
        """Change the request's headers; return the target to ask for."""
        way = self._way
        if way.request_changes:
            head.fields, head.lines = change_lines(head.fields, head.lines, way.request_changes)
        return way.target(head.target)

    def edit(self, head: ResponseHead) -> None:
        """Change the response's headers."""
        head.fields, head.lines = change_lines(head.fields, head.lines, self._changes)

    # HTTP/2

    def target(self, target: bytes) -> bytes:
        """Return the target to ask for."""
        return self._way.target(target)

    def asked(self, fields: list[Field]) -> list[Field]:
        """Return the request's fields as they are sent on."""
        changes = self._way.request_changes
        return change_lines(fields, [], changes)[0] if changes else fields

    def answered(self, fields: list[Field]) -> list[Field]:
        """Return the response's fields as they are sent on."""
        return change_lines(fields, [], self._changes)[0] if self._changes else fields


def source_of(client: Channel) -> str:
    """Return the address of the app's connection, or ``""``."""
    transport = client.transport if isinstance(client, SocketChannel) else None
    name = transport.get_extra_info("peername") if transport is not None else None
    return str(name[0]) if isinstance(name, tuple) and name else ""


def aim_at(service: Service, asked: Asked, client: Channel) -> RequestAim | None:
    """Return what the plan says of a request; None when there is no plan."""
    routing = service.routing
    return None if routing is None else RequestAim(service, routing.request(asked), asked, client)


def choose(service: Service, tried: set[Hashable], aim: object) -> Instance | None:
    """Choose the instance for a request, outside ``tried``."""
    now = service.pool.poller.now()
    exclude = cast("set[Key]", tried)
    if isinstance(aim, RequestAim):
        instance = aim.destination.pick(now, exclude, aim.hashed)
    else:
        instance = service.balancer.pick(now, exclude)
    if tried and instance is not None:
        service.count("lictor_retries_total")
    elif not tried:
        service.budget.connection()
    return instance


class Chooser:
    """The instances of one upstream, one to be chosen for each request."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def unavailable(self) -> str:
        """Return why nothing can be sent now, or ``""``."""
        return self.service.unavailable()

    def aim_at(self, asked: Asked, client: Channel) -> RequestAim | None:
        """As the function."""
        return aim_at(self.service, asked, client)

    def choose(self, tried: set[Hashable], aim: object) -> Instance | None:
        """As the function."""
        return choose(self.service, tried, aim)

    def may_retry(self) -> bool:
        """Take leave for one retry."""
        return self.service.budget.take(self.service.pool.poller.now())


class InstanceUse:
    """One request to one instance: the instance counts it, and learns how it went."""

    __slots__ = ("_done", "instance", "key", "service")

    def __init__(self, service: Service, instance: Instance) -> None:
        self.service = service
        self.instance = instance
        self._done = False
        self.key: Hashable = instance.key
        instance.active += 1

    def failed(self, reason: str) -> None:
        """The instance could not be reached."""
        report_failure(self.service, self.instance, reason)

    def silent(self, reason: str) -> None:
        """The instance took the request and did not answer it."""
        report_silence(self.service, self.instance, reason)

    def answered(self, status: int) -> None:
        """The instance's app gave an answer with this HTTP status, or one that says the same."""
        report_answer(self.service, self.instance, status)

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        """The instance's sidecar did not take the stream: return the answer if no other one would, else None."""
        return report_refusal(self.service, self.instance, refused)

    def release(self) -> bool:
        """The request has ended. Returns whether this was the first to say so."""
        if self._done:
            return False
        self._done = True
        self.instance.active -= 1
        return True


class LoopbackUse:
    """One request to our own app, without the mesh between: there is no other one, and nobody judges it."""

    __slots__ = ("key", "port")

    def __init__(self, port: int) -> None:
        self.port = port
        self.key: Hashable = ("loopback", port)

    def failed(self, reason: str) -> None:
        """As :meth:`InstanceUse.failed`."""

    def silent(self, reason: str) -> None:
        """As :meth:`InstanceUse.silent`."""

    def answered(self, status: int) -> None:
        """As :meth:`InstanceUse.answered`."""

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        """As :meth:`InstanceUse.refusal`."""
        return None


def report_failure(service: Service, instance: Instance, reason: str) -> None:
    """The instance could not be reached: it may be left out for a while."""
    if instance.owner.failed(instance, service.pool.poller.now()):
        _report_ejection(service, instance, reason)


def report_silence(service: Service, instance: Instance, reason: str) -> None:
    """The instance took a request and did not answer it: if it answers none, it may be left out for a while."""
    if instance.owner.silent(instance, service.pool.poller.now()):
        _report_ejection(service, instance, reason)


def report_answer(service: Service, instance: Instance, status: int) -> None:
    """The instance's app gave an answer with this HTTP status: where answers are judged, it may be left out."""
    if instance.owner.answered(instance, status, service.pool.poller.now()):
        _report_ejection(service, instance, f"answered {status} too often in a row")


def report_refusal(service: Service, instance: Instance, refused: StreamRefused) -> tuple[int, str] | None:
    """The instance's sidecar did not take the stream: return the answer if no other one would, else None."""
    cause = frames.CODE_NAMES.get(refused.code, "other")
    service.count("lictor_refusals_received_total", reason=cause)
    if refused.code in _INSTANCE_FAULTS:
        report_failure(service, instance, str(refused))
    elif refused.code == frames.DENIED:
        return 403, f"destination {instance.key.service!r} denies calls of this service"
    elif refused.code not in _AVOIDABLE:
        return 502, f"{instance.key.instance} refused the call: {cause}"
    return None


def _report_ejection(service: Service, instance: Instance, reason: str) -> None:
    service.count("lictor_ejections_total")
    key = instance.key
    service.limited.warning(f"ejected {key}", f"upstream {service.name}: {key.instance} left out: {reason}")


def is_retiring(channel: Channel) -> bool:
    """Whether a channel's session takes no more streams: one that is kept for later should end then."""
    return isinstance(channel, MuxStream) and channel.retiring
