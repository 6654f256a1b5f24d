"""HTTP/2 of our app: binds the filter's outbound side (:mod:`proxy.http2.outbound`) to balancer, sessions and links.

The links to an instance are shared by all of the app's connections to an upstream. On a session between Lictor
sidecars a link is a stream of the session; to a foreign peer it is a TLS connection of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING

from proxy.balancer import Instance, Key
from proxy.choosing import Chooser, InstanceUse, LoopbackUse, RequestAim, View, is_retiring, report_failure
from proxy.errors import ConnectFailed, StreamClosed, StreamRefused
from proxy.http2.fleet import Aim, Lease
from proxy.http2.half import PREFACE
from proxy.http2.head import RequestHead
from proxy.http2.link import Link
from proxy.http_app import HttpAppConnection
from proxy.mux.core import MuxStream
from proxy.mux.session import MuxSession
from proxy.relay import SocketChannel, dial
from proxy.stream import Channel, Data

if TYPE_CHECKING:
    from proxy.outbound import Upstream as Service

IDLE_S = 60.0
"""A link without a request is kept this long."""
ACCEPT_TIMEOUT_S = 10.0
"""How long an instance's sidecar may take to accept a link."""
_TELLING_BYTES = 3
"""``PRI`` begins no method of HTTP/1.1 that is accepted; shorter beginnings could be ``PUT``, ``POST``, ``PATCH``."""


class Http2Fleet(Chooser):
    """The instances of one upstream, with the links to each."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._links: dict[Hashable, list[Link]] = {}
        """Those that may take streams, the newest last."""
        self._idle: dict[Link, float] = {}
        """Links without a request, and since when."""
        self._opening: dict[Link, float] = {}
        """Links that are to be accepted, and until when, the oldest first."""
        self._coming: dict[Hashable, asyncio.Task[Exception | None]] = {}

    def aim(self, head: RequestHead, client: Channel) -> RequestAim | None:
        return self.aim_at(View(head.method, head.target, head.all_fields()), client)

    def pick(self, tried: set[Hashable], aim: Aim | None) -> Lease | None:
        service = self.service
        if service.spec is not None and service.spec.loopback_port:
            return LoopbackLease(self, service.spec.loopback_port)
        instance = self.choose(tried, aim)
        return None if instance is None else InstanceLease(self, instance)

    # Links

    def take(self, key: Hashable) -> Link | None:
        """Return a link that takes a stream."""
        for link in reversed(self._links.get(key, ())):
            if is_retiring(link.half.channel):
                self._let_go(key, link)
                return self.take(key)
            if not (link.closed or link.leaving or link.full):
                self._idle.pop(link, None)
                return link
        return None

    def shut(self, key: Hashable) -> bool:
        """Whether a link says that no streams are taken at all: one more would say the same, for each request."""
        links = self._links.get(key, ())
        return any(x.known and not (x.closed or x.leaving or x.half.core.peer_streams_max) for x in links)

    def _let_go(self, key: Hashable, link: Link) -> None:
        """It takes no more streams, and ends with its last one."""
        self._links[key].remove(link)
        link.leave()

    def open(self, session: MuxSession, instance: Instance) -> Link:
        """Open a link on a session."""
        link = self._new(instance.key)
        fate = _LinkFate(self, instance, link)
        link.half.channel = session.core.open(instance.key.service, link.half, fate)
        self._opening[link] = asyncio.get_running_loop().time() + ACCEPT_TIMEOUT_S
        link.half.flush()
        return link

    async def connect(self, instance: Instance) -> Link:
        """Return a link to an instance that takes a stream. Raises :class:`~proxy.errors.ConnectFailed`, OSError."""
        return await self._made(instance.key, instance, 0)

    async def connect_loopback(self, key: Hashable, port: int) -> Link:
        """The same to our own app. Raises as :meth:`connect`."""
        return await self._made(key, None, port)

    async def _made(self, key: Hashable, instance: Instance | None, port: int) -> Link:
        while True:
            if (link := self.take(key)) is not None:
                return link
            if self.shut(key):
                raise ConnectFailed("refused", "takes no requests for now")
            task = self._coming.get(key)
            if task is None:
                task = self._coming[key] = self.service.tasks.spawn(self._dial(key, instance, port))
                task.add_done_callback(lambda _: self._coming.pop(key, None))
            await asyncio.wait([task])  # others wait for it too, so it is not cancelled with us
            if task.cancelled():
                raise ConnectFailed("closed", "the sidecar is closing")
            if (error := task.result()) is not None:
                try:
                    raise error
                finally:
                    del error, task  # it refers to them, by its traceback

    async def _dial(self, key: Hashable, instance: Instance | None, port: int) -> Exception | None:
        """Make a link; the failure is a value, which each of those who wait raises."""
        try:
            if instance is None:
                await self._dial_app(key, port)
            else:
                await self._dial_instance(instance)
        except (ConnectFailed, OSError) as error:
            return error
        return None

    async def _dial_instance(self, instance: Instance) -> None:
        service = self.service
        timeout_s = instance.owner.options.connect_timeout_s
        result = await service.pool.connect(instance.key, timeout_s, http2=True)
        if isinstance(result, MuxSession):
            self.open(result, instance)
            return
        link = self._new(instance.key)
        link.half.channel = result
        result.attach(link.half)
        link.half.flush()
        instance.owner.succeeded(instance)

    async def _dial_app(self, key: Hashable, port: int) -> None:
        service = self.service
        link = self._new(key)

        made = SocketChannel()
        made.peer = link.half
        host = (service.me.local_address if service.me else "") or "127.0.0.1"
        try:
            async with asyncio.timeout(service.settings.connect_timeout_s):
                await dial(made, host, port)
        except (OSError, TimeoutError) as error:
            self._links[key].remove(link)
            text = f"our own app at {host}:{port} cannot be reached: {error or 'timeout'}"
            raise ConnectFailed("app-down", text) from error
        link.attach(made)

    def _new(self, key: Hashable) -> Link:
        links = self._links.setdefault(key, [])

        def ended(link: Link, error: Exception | None) -> None:
            self._idle.pop(link, None)
            self._opening.pop(link, None)
            if link in links:
                links.remove(link)
            self._note_end(key, link, error)

        def settled(link: Link) -> None:
            self._idle[link] = asyncio.get_running_loop().time()

        link = Link(linger_s=self.service.http_options.http.linger_s, on_end=ended, on_settled=settled)
        links.append(link)
        return link

    def _note_end(self, key: Hashable, link: Link, error: Exception | None) -> None:
        """An instance that took a link and then said nothing on it is at fault; if it refused, its requests tell."""
        if link.heard or isinstance(error, StreamRefused) or not link.exchanges:
            return
        for balancer in self.service.balancers.values():
            instance = balancer.instances.get(key) if isinstance(key, Key) else None
            if instance is not None:
                report_failure(self.service, instance, str(error) if error else "closed the connection")

    def accepted(self, link: Link) -> None:
        """The instance's sidecar took the link."""
        self._opening.pop(link, None)

    # Now and then

    def tick(self, now: float) -> None:
        """Give up on links that were not accepted in time. Called every second."""
        while self._opening:
            link, deadline = next(iter(self._opening.items()))
            if deadline > now:
                break
            self._opening.pop(link)
            link.cut(StreamClosed("the instance did not accept in time"))

    def sweep(self) -> None:
        """Close what was idle for long, or cannot be used any more. Called now and then."""
        stale = asyncio.get_running_loop().time() - IDLE_S
        for key, links in list(self._links.items()):
            for link in list(links):
                if is_retiring(link.half.channel) or self._idle.get(link, stale) < stale:
                    self._let_go(key, link)
            if not links and key not in self._coming:
                self._links.pop(key, None)

    def drop(self, keys: Collection[Key], reason: str) -> None:
        """The instances are gone: cut what is under way to them."""
        for key in keys:
            for link in list(self._links.get(key, ())):
                link.cut(StreamClosed(reason))


class InstanceLease(InstanceUse):
    """One request to one instance."""

    __slots__ = ("_fleet",)

    def __init__(self, fleet: Http2Fleet, instance: Instance) -> None:
        super().__init__(fleet.service, instance)
        self._fleet = fleet

    def link(self) -> Link | None:
        link = self._fleet.take(self.key)
        if link is not None or self._fleet.shut(self.key):
            return link
        session = self.service.pool.ready(self.instance.key)
        return None if session is None else self._fleet.open(session, self.instance)

    async def connect(self) -> Link:
        return await self._fleet.connect(self.instance)

    def done(self) -> None:
        self.release()


class LoopbackLease(LoopbackUse):
    """One request to our own app, without the mesh between."""

    __slots__ = ("_fleet",)

    def __init__(self, fleet: Http2Fleet, port: int) -> None:
        super().__init__(port)
        self._fleet = fleet

    def link(self) -> Link | None:
        return self._fleet.take(self.key)

    async def connect(self) -> Link:
        return await self._fleet.connect_loopback(self.key, self.port)

    def done(self) -> None:
        pass


class _LinkFate:
    """Turns a mux stream's fate into its link's."""

    __slots__ = ("_fleet", "_instance", "_link")

    def __init__(self, fleet: Http2Fleet, instance: Instance, link: Link) -> None:
        self._fleet = fleet
        self._instance = instance
        self._link = link

    def stream_accepted(self, stream: MuxStream) -> None:
        self._fleet.accepted(self._link)
        self._instance.owner.succeeded(self._instance)

    def stream_refused(self, stream: MuxStream, code: int, text: str) -> None:
        self._link.half.abort(StreamRefused(code, f"{self._instance.key.instance}: {text}"))

    def stream_closed(self, stream: MuxStream) -> None:
        pass  # the channel's peer, the link, is told


class Http2AppConnection(HttpAppConnection):
    """A connection of our app to an upstream that speaks HTTP/2. What the app speaks, its first bytes tell."""

    __slots__ = ("_early",)

    def begin(self) -> None:
        self._early = b""
        self.peer = _Undecided(self)

    def first_bytes(self, data: Data, *, ended: bool) -> None:
        """Bytes came, or the end: choose what is to serve them."""
        self._early += bytes(data)
        if len(self._early) < _TELLING_BYTES and PREFACE.startswith(self._early) and not ended:
            return
        if self._early[:_TELLING_BYTES] == PREFACE[:_TELLING_BYTES]:
            self._connection = self._service.http2.serve(self)
        else:
            self._connection = self._service.http.serve(self)
        early, self._early = self._early, b""
        if early:
            self.peer.write(early)
        if ended:
            self.peer.write_eof()


class _Undecided:
    """The app's connection's peer until it has said enough."""

    __slots__ = ("_connection", "peer")

    def __init__(self, connection: Http2AppConnection) -> None:
        self._connection = connection
        self.peer: Channel = connection

    def write(self, data: Data) -> None:
        self._connection.first_bytes(data, ended=False)

    def write_eof(self) -> None:
        self._connection.first_bytes(b"", ended=True)

    def abort(self, error: Exception | None = None) -> None:
        """It said nothing; there is nothing to end."""

    def pause_reading(self) -> None:
        """Nothing was sent yet, so this cannot be."""

    def resume_reading(self) -> None:
        """As above."""
