"""``/v1/connect/ca`` and Lictor's own ``/v1/connect/revocations``."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.http.answers.connect import AuthorityConfig, Roots
from node.http.context import Context, Routes
from node.http.errors import BadRequest, NotFound
from node.http.reading import Reading, answer, read
from node.http.respond import json_response
from node.http.writing import body_as, request_id, write
from raftstate.model.connect import CAConfig, CARoot, CARoots, Revocation
from raftstate.model.wire import Wire
from raftstate.state import commands

routes = Routes("connect")
REVOCATION_KINDS = ("instance", "service", "serial")


def roots_shape(roots: CARoots) -> Roots:
    """The trust bundle as Consul shows it."""
    return {
        "ActiveRootID": roots.active_root_id,
        "TrustDomain": roots.trust_domain,
        "Roots": [
            {
                "ID": root.id,
                "Name": root.name,
                "SerialNumber": root.serial_number,
                "SigningKeyID": root.signing_key_id,
                "ExternalTrustDomain": roots.trust_domain.partition(".")[0],
                "NotBefore": root.not_before,
                "NotAfter": root.not_after,
                "RootCert": root.root_cert,
                "IntermediateCerts": root.intermediate_certs or None,
                "Active": root.active,
                "PrivateKeyType": "ec",
                "PrivateKeyBits": 256,
                "CreateIndex": root.create_index,
                "ModifyIndex": root.modify_index,
            }
            for root in roots.roots
        ],
    }


async def answer_roots(ctx: Context, request: web.Request) -> web.Response:
    """Answer with the trust bundle; ``?pem`` gives the certificates alone."""
    reading = await read(ctx, request, "connect.roots", rows=False)
    roots = reading.decode(CARoots)
    if request.query.get("pem", "") in ("1", "true"):
        text = "".join(
            root.root_cert if root.root_cert.endswith("\n") else root.root_cert + "\n" for root in roots.roots
        )
        return web.Response(text=text, headers=reading.headers, content_type="application/pem-certificate-chain")
    return answer(request, reading, roots_shape(roots))


@routes.add("GET", "/v1/connect/ca/roots", answer=Roots, text="application/pem-certificate-chain")
async def roots(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The trust bundle."""
    return await answer_roots(ctx, request)


@routes.add("GET", "/v1/connect/ca/configuration", answer=AuthorityConfig)
async def configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The certificate authority's configuration."""
    reading = await read(ctx, request, "connect.ca_config", rows=False)
    config = reading.optional(CAConfig)
    if config is None:
        raise NotFound("the certificate authority has not been set up yet: retry once a leader is elected")
    shown = {
        "Provider": config.provider,
        "Config": config.config,
        "State": config.state or None,
        "ForceWithoutCrossSigning": config.force_without_cross_signing,
        "CreateIndex": config.create_index,
        "ModifyIndex": config.modify_index,
    }
    return answer(request, reading, shown)


class ConfigurationBody(Wire, frozen=True):
    """``PUT /v1/connect/ca/configuration``."""

    provider: str = "consul"
    config: dict[str, Any] = {}
    state: dict[str, str] = {}
    force_without_cross_signing: bool = False


@routes.add("PUT", "/v1/connect/ca/configuration", body=ConfigurationBody, answer=bool)
async def set_configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set the certificate authority's configuration."""
    body = await body_as(ctx, request, ConfigurationBody)
    if body.provider != "consul":
        raise BadRequest(f"CA provider {body.provider!r} is not supported: Lictor has its own, called 'consul'")
    await write(
        ctx,
        request,
        commands.SetCAConfig(
            provider=body.provider,
            config=body.config,
            state=body.state,
            force_without_cross_signing=body.force_without_cross_signing,
        ),
    )
    return json_response(request, True)


@routes.add("PUT", "/v1/connect/ca/rotate", answer=CARoot)
async def rotate(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Make a new root, cross-signed by the old one (Lictor's own endpoint)."""
    given = request_id(request)
    return json_response(request, await ctx.backend.operator("ca.rotate", {"request_id": given} if given else {}))


def _revocations(reading: Reading) -> list[Revocation]:
    return sorted(reading.decode(list[Revocation]), key=lambda row: (row.kind, row.service, row.value))


@routes.add("GET", "/v1/connect/revocations", answer=list[Revocation])
async def revocations(ctx: Context, request: web.Request) -> web.StreamResponse:
    """What identities are withdrawn (Lictor's own endpoint)."""
    reading = await read(ctx, request, "connect.revocations")
    return answer(request, reading, _revocations(reading))


class RevocationBody(Wire, frozen=True):
    """``PUT /v1/connect/revocations``."""

    kind: str = ""
    value: str = ""
    service: str = ""
    reason: str = ""


@routes.add("PUT", "/v1/connect/revocations", body=RevocationBody, answer=bool)
async def revoke(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Withdraw an identity: an instance's, a service's, or one certificate by serial number."""
    body = await body_as(ctx, request, RevocationBody)
    if body.kind not in REVOCATION_KINDS or not body.value:
        raise BadRequest(f"Kind must be one of {', '.join(REVOCATION_KINDS)} and Value must be set")
    command = commands.Revoke(body.kind, _value(body.kind, body.value), body.service, body.reason)
    return json_response(request, await write(ctx, request, command))


@routes.add("DELETE", "/v1/connect/revocations", answer=bool)
async def restore(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Take a withdrawal back: ``?kind=&value=&service=``."""
    kind, value = request.query.get("kind", ""), request.query.get("value", "")
    if kind not in REVOCATION_KINDS or not value:
        raise BadRequest(f"?kind= must be one of {', '.join(REVOCATION_KINDS)} and ?value= must be set")
    there_was = await write(
        ctx, request, commands.Restore(kind, _value(kind, value), request.query.get("service", ""))
    )
    if not there_was:
        raise NotFound(f"{kind} {value} is not revoked")
    return json_response(request, True)


def _value(kind: str, value: str) -> str:
    """Serial numbers are compared in one spelling: lower-case hex bytes joined by colons."""
    if kind != "serial":
        return value
    digits = value.replace(":", "").lower()
    if not digits or any(digit not in "0123456789abcdef" for digit in digits) or len(digits) > 64:
        raise BadRequest(f"serial number {value[:80]!r} is not hexadecimal")
    digits = digits if len(digits) % 2 == 0 else "0" + digits
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))
