"""Who a workload is: the SPIFFE id and the instance id that a leaf certificate carries.

Source: SPIFFE-ID standard, section 2; Consul's form ``spiffe://<trust-domain>/ns/<ns>/dc/<dc>/svc/<name>``.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

from raftstate.model.wire import Wire

MAX_SPIFFE_ID_BYTES = 2048
"""SPIFFE-ID standard, section 2.3: implementations support ids up to 2048 bytes."""


class InvalidSpiffeId(ValueError):
    """The text is not a SPIFFE id of a service; the message says which part is wrong."""


class SpiffeId(Wire, frozen=True):
    """A service's identity: trust domain, namespace, datacenter and service name."""

    trust_domain: str
    service: str
    datacenter: str = "dc1"
    namespace: str = "default"

    def uri(self) -> str:
        """Return the URI form, as it stands in the certificate's one URI SAN."""
        parts = (
            quote(self.namespace, safe=""),
            quote(self.datacenter, safe=""),
            quote(self.service, safe=""),
        )
        return "spiffe://{}/ns/{}/dc/{}/svc/{}".format(self.trust_domain, *parts)

    @classmethod
    def parse(cls, uri: str) -> SpiffeId:
        """Parse the URI form. Raises :class:`InvalidSpiffeId`."""
        if len(uri.encode()) > MAX_SPIFFE_ID_BYTES:
            raise InvalidSpiffeId("SPIFFE id is longer than 2048 bytes")
        if not uri.startswith("spiffe://"):
            raise InvalidSpiffeId(f"not a SPIFFE id (must begin with spiffe://): {uri[:80]!r}")
        trust_domain, _, path = uri[len("spiffe://") :].partition("/")
        parts = path.split("/")
        if not trust_domain or len(parts) != 6 or parts[0::2] != ["ns", "dc", "svc"] or not all(parts):
            raise InvalidSpiffeId(f"SPIFFE id must be spiffe://TRUST-DOMAIN/ns/NS/dc/DC/svc/SERVICE: {uri[:80]!r}")
        return cls(
            trust_domain=trust_domain.lower(),
            namespace=unquote(parts[1]),
            datacenter=unquote(parts[3]),
            service=unquote(parts[5]),
        )


class Identity(Wire, frozen=True):
    """What a verified peer certificate says of its bearer; the subject of every decision."""

    service: str
    instance: str = ""
    """The instance id (subject UID); empty when the certificate names the service only."""
    serial: str = ""
    """Certificate serial number as Consul prints it: lower-case hex bytes joined by ``:``."""
    trust_domain: str = ""
    datacenter: str = ""
