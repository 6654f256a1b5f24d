"""What names below the mesh's domains mean, and the records that answer for them.

Source: Consul's "Services DNS lookup" pages; RFC 1035 (messages), RFC 2308 (negative answers), RFC 2782 (SRV),
RFC 6891 (EDNS). TTLs are 0: instances come and go, and a cached dead one is worse than a question more.
"""

from __future__ import annotations

import ipaddress
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from dnslib import AAAA, CLASS, CNAME, NS, PTR, QTYPE, RCODE, RR, SOA, SRV, TXT, A, DNSLabel, DNSRecord

from node.nearness import Place, distance, place_of_instance
from raftstate.model.catalog import PASSING, InstanceHealth, Node

TTL_S = 0
REFRESH_S, RETRY_S, EXPIRE_S, NEGATIVE_S = 3600, 600, 86400, 0
BUILTIN_DOMAINS = ("consul", "lictor")
UDP_PLAIN_MAX = 512
UDP_EDNS_MAX = 4096
UDP_ADDRESSES_MAX = 3
"""Without EDNS Consul answers with three addresses at most, which suits resolvers that cannot retry by TCP."""
TCP_MAX = 65535
LABELS_MAX = 12
_ANY_CLASS = 255
_NAME = re.compile(r"[a-z0-9_.-]{1,253}")


class Directory(Protocol):
    """Where answers come from: this node's views. Methods raise NodeError while nothing is known."""

    async def service_name(self, name: str) -> str | None:
        """Return the registered spelling of a service's name, compared without case."""

    async def instances(self, service: str, *, connect: bool) -> list[InstanceHealth]:
        """Return a service's instances, or what answers for it in the mesh."""

    async def node(self, name: str) -> Node | None:
        """Return a node by name, compared without case."""

    async def node_at(self, address: str) -> Node | None:
        """Return the node of an address."""


@dataclass(slots=True)
class Found:
    """A name's records; ``exists`` is False for a name that is not there at all (NXDOMAIN)."""

    answers: list[RR]
    additional: list[RR]
    exists: bool = True


NOTHING = Found([], [], exists=False)


class Zone:
    """Answers questions about one datacenter's names under several domains."""

    def __init__(
        self, directory: Directory, datacenter: str, domains: Iterable[str], *, here: Place, rng: random.Random
    ) -> None:
        self._directory, self._datacenter, self._here, self._rng = directory, datacenter.lower(), here, rng
        named = [domain.strip(".").lower() for domain in domains if domain.strip(".")]
        self.domain = (named or list(BUILTIN_DOMAINS))[0]
        """The one that our own answers use where the question names none."""
        self.domains = tuple(sorted({*named, *BUILTIN_DOMAINS}, key=lambda one: (-len(one), one)))

    async def answer(self, request: DNSRecord, *, udp: bool) -> DNSRecord:
        """Return the reply to a request, small enough for the way it came."""
        reply = request.reply(ra=0, aa=0)
        limit = TCP_MAX
        if udp:
            limit = _udp_limit(request)
        if request.header.opcode != 0 or len(request.questions) != 1:
            reply.header.rcode = RCODE.NOTIMP if request.header.opcode else RCODE.FORMERR
            return reply
        name = str(request.q.qname).rstrip(".").lower()
        if request.q.qclass not in (CLASS.IN, _ANY_CLASS):
            reply.header.rcode = RCODE.REFUSED
            return reply
        if name.endswith((".in-addr.arpa", ".ip6.arpa")):
            return await self._reverse(reply, name)
        domain = next((one for one in self.domains if name == one or name.endswith("." + one)), None)
        if domain is None:
            # Not ours, and nobody is asked on the client's behalf.
            reply.header.rcode = RCODE.REFUSED
            return reply
        reply.header.aa = 1
        await self._fill(reply, request, name, domain)
        return fitted(reply, limit, udp_plain=udp and limit <= UDP_PLAIN_MAX)

    async def _fill(self, reply: DNSRecord, request: DNSRecord, name: str, domain: str) -> None:
        labels = name[: -len(domain)].strip(".").split(".") if name != domain else []
        kind = request.q.qtype
        if not labels:
            found = self._apex(domain, kind, request.q.qname)
        elif len(labels) > LABELS_MAX or not _NAME.fullmatch(name):
            found = NOTHING
        else:
            found = await self._lookup(labels, domain, kind, request.q.qname)
        for record in found.answers:
            reply.add_answer(record)
        for record in found.additional:
            reply.add_ar(record)
        if not found.answers:
            reply.header.rcode = RCODE.NOERROR if found.exists else RCODE.NXDOMAIN
            reply.add_auth(_soa(domain))

    def _apex(self, domain: str, kind: int, name: DNSLabel) -> Found:
        answers = []
        if kind in (QTYPE.SOA, QTYPE.ANY):
            answers.append(_soa(domain))
        if kind in (QTYPE.NS, QTYPE.ANY):
            server = f"{self._here.node}.node.{self._datacenter}.{domain}."
            answers.append(RR(name, QTYPE.NS, ttl=TTL_S, rdata=NS(server)))
        return Found(answers, [])

    async def _lookup(self, labels: list[str], domain: str, kind: int, name: DNSLabel) -> Found:
        """Labels are ``<what…>.<kind>[.<datacenter>]``."""
        kinds = ("service", "node", "connect", "addr")
        names_datacenter = len(labels) >= 2 and labels[-1] not in kinds and labels[-2] in kinds
        if names_datacenter and labels.pop() != self._datacenter:
            return NOTHING
        what, family = labels[:-1], labels[-1]
        if not what or family not in kinds:
            return NOTHING
        if family == "addr":
            return _packed_address(what, kind, name)
        if family == "node":
            node = await self._directory.node(".".join(what))
            return NOTHING if node is None else _node_records(node, kind, name)
        tag = ""
        if len(what) == 2 and what[0].startswith("_") and what[1].startswith("_"):
            # RFC 2782: _name._tag; "_tcp" and "_udp" are the protocol and no tag.
            service, tag = what[0][1:], what[1][1:]
            tag = "" if tag in ("tcp", "udp") else tag
        elif len(what) == 1:
            service = what[0]
        else:
            # A tag may hold dots, a service's name in DNS may not.
            service, tag = what[-1], ".".join(what[:-1])
        return await self._service(service, tag, family == "connect", kind, name, domain)

    async def _service(self, service: str, tag: str, connect: bool, kind: int, name: DNSLabel, domain: str) -> Found:
        spelled = await self._directory.service_name(service)
        if spelled is None:
            return NOTHING
        rows = [
            row
            for row in await self._directory.instances(spelled, connect=connect)
            if row.status() == PASSING and (not tag or tag in {one.lower() for one in row.service.tags})
        ]
        if not rows:
            return NOTHING
        self._rng.shuffle(rows)
        rows.sort(key=lambda row: distance(self._here, place_of_instance(row)))
        if kind == QTYPE.SRV:
            return self._srv(rows, name, domain)
        answers: list[RR] = []
        for row in rows:
            answers.extend(_address_records(name, row.dial_address(), kind))
        return Found(_unique(answers), [])

    def _srv(self, rows: list[InstanceHealth], name: DNSLabel, domain: str) -> Found:
        answers, additional = [], []
        for row in rows:
            address = row.dial_address()
            if row.service.address and row.service.address != row.node.address:
                packed = _pack(address)
                target = f"{packed}.addr.{self._datacenter}.{domain}." if packed else address.rstrip(".") + "."
            else:
                target = f"{row.node.node}.node.{self._datacenter}.{domain}."
            weight = min(row.service.weights.passing, 65535)
            answers.append(RR(name, QTYPE.SRV, ttl=TTL_S, rdata=SRV(1, weight, row.service.port, target)))
            if _pack(address):
                additional.extend(_address_records(target, address, QTYPE.ANY))
        return Found(_unique(answers), _unique(additional))

    async def _reverse(self, reply: DNSRecord, name: str) -> DNSRecord:
        address = _from_arpa(name)
        node = await self._directory.node_at(address) if address else None
        reply.header.aa = 1
        if node is None:
            reply.header.rcode = RCODE.NXDOMAIN
            reply.add_auth(_soa(self.domain))
        elif reply.q.qtype in (QTYPE.PTR, QTYPE.ANY):
            target = f"{node.node}.node.{self._datacenter}.{self.domain}."
            reply.add_answer(RR(reply.q.qname, QTYPE.PTR, ttl=TTL_S, rdata=PTR(target)))
        return reply


def _udp_limit(request: DNSRecord) -> int:
    for record in request.ar:
        if record.rtype == QTYPE.OPT:
            return max(min(int(record.edns_len), UDP_EDNS_MAX), UDP_PLAIN_MAX)
    return UDP_PLAIN_MAX


def fitted(reply: DNSRecord, limit: int, *, udp_plain: bool) -> DNSRecord:
    """Drop records from the end until the reply fits; what of the answers is lost is told by TC."""
    cut = False
    if udp_plain:
        addresses = [record for record in reply.rr if record.rtype in (QTYPE.A, QTYPE.AAAA)]
        if len(addresses) > UDP_ADDRESSES_MAX:
            reply.rr = [record for record in reply.rr if record not in addresses[UDP_ADDRESSES_MAX:]]
            # As Consul does: a full choice of three is a whole answer; no second question by TCP is asked for.
    while len(reply.pack()) > limit:
        if reply.ar and reply.ar[-1].rtype != QTYPE.OPT:
            keep = len(reply.ar) // 2
            reply.ar = reply.ar[:keep]
        elif reply.rr:
            reply.rr = reply.rr[: len(reply.rr) * 3 // 4]
            cut = True
        else:
            break
    if cut:
        reply.header.tc = 1
    return reply


def _soa(domain: str) -> RR:
    # The serial number has no meaning here: there are no zone transfers.
    times = (1, REFRESH_S, RETRY_S, EXPIRE_S, NEGATIVE_S)
    return RR(domain, QTYPE.SOA, ttl=TTL_S, rdata=SOA(f"ns.{domain}.", f"hostmaster.{domain}.", times))


def _address_records(name: Any, address: str, kind: int) -> list[RR]:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return [RR(name, QTYPE.CNAME, ttl=TTL_S, rdata=CNAME(address.rstrip(".") + "."))]
    if parsed.version == 4:
        return [RR(name, QTYPE.A, ttl=TTL_S, rdata=A(address))] if kind in (QTYPE.A, QTYPE.ANY) else []
    return [RR(name, QTYPE.AAAA, ttl=TTL_S, rdata=AAAA(address))] if kind in (QTYPE.AAAA, QTYPE.ANY) else []


def _node_records(node: Node, kind: int, name: DNSLabel) -> Found:
    answers = _address_records(name, node.address, kind) if kind != QTYPE.TXT else []
    if kind in (QTYPE.TXT, QTYPE.ANY):
        for key, value in sorted(node.meta.items()):
            # Consul: a key that begins with rfc1035- gives its bare value.
            text = value if key.startswith("rfc1035-") else f"{key}={value}"
            answers.append(RR(name, QTYPE.TXT, ttl=TTL_S, rdata=TXT(text.encode()[:255])))
    return Found(answers, [])


def _unique(records: list[RR]) -> list[RR]:
    seen: dict[tuple[str, int, str], RR] = {}
    for record in records:
        seen.setdefault((str(record.rname), record.rtype, str(record.rdata)), record)
    return list(seen.values())


def _pack(address: str) -> str:
    """Return an address in hex, as it stands in ``<hex>.addr.<dc>.<domain>``; empty for a host name."""
    try:
        return ipaddress.ip_address(address).packed.hex()
    except ValueError:
        return ""


def _packed_address(what: list[str], kind: int, name: DNSLabel) -> Found:
    try:
        address = str(ipaddress.ip_address(bytes.fromhex(what[0]))) if len(what) == 1 else ""
    except ValueError:
        address = ""
    return Found(_address_records(name, address, kind), []) if address else NOTHING


def _from_arpa(name: str) -> str:
    """Return the address that a reverse name means; empty when it is none."""
    try:
        if name.endswith(".in-addr.arpa"):
            return str(ipaddress.IPv4Address(".".join(reversed(name[: -len(".in-addr.arpa")].split(".")))))
        digits = "".join(reversed(name[: -len(".ip6.arpa")].split(".")))
        return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    except ValueError:
        return ""
