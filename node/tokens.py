"""Who asks: from the secret that a request shows to what its bearer may do.

A secret is looked up by its hash in the replicated state, as this node has it, and what it comes to is compiled once
and kept until a row of access control changes. When no server can be asked, a bearer that is known keeps what it was
last known to have; one that is not known has nothing.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from node.backend import Backend, QueryResult
from node.config import ClusterConfig
from node.errors import NodeError, PkiError, Refused
from raftstate.acl import (
    ALLOW_ALL,
    DENY,
    WRITE,
    Authorizer,
    BadRules,
    compile_rules,
    node_rules,
    parse_rules,
    service_rules,
)
from raftstate.model.acl import ANONYMOUS_ID, MANAGEMENT_ID, Grants, Token

log = logging.getLogger("lictor.acl")

SECRET_CHARS_MIN = 32
SECRET_CHARS_MAX = 512
KNOWN_MAX = 2048
"""Bearers that are remembered; the least recently seen is forgotten first."""
KNOWN_WAIT_S = 1.0
"""How long the servers may take to confirm a bearer that is known already."""
UNKNOWN_WAIT_S = 2.0
"""And to tell of one that is not: longer than an election takes, as a rule."""
FOLLOW_WAIT_S = 300.0
RETRY_S = 1.0
NOT_FOUND = "ACL not found"


def load_secret(path: str) -> str:
    """Read the first management token. Raises PkiError: missing, short, or open to others."""
    file = Path(path)
    try:
        mode = file.stat().st_mode & 0o777
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PkiError(
            f"acl_token_file {path} cannot be read ({error}): uuidgen > {path}; chmod 600 {path}"
        ) from None
    if mode & 0o077:
        raise PkiError(f"acl_token_file {path} can be read by others (mode {mode:04o}): chmod 600 it")
    if len(secret) < SECRET_CHARS_MIN:
        raise PkiError(f"acl_token_file {path} must hold at least {SECRET_CHARS_MIN} characters: uuidgen > {path}")
    return secret


def hash_of(secret: str) -> str:
    """Return the form in which a secret is stored and looked up: secrets are random, so a plain hash will do."""
    return hashlib.sha256(secret.encode()).hexdigest()


def bearer_token(headers: Mapping[str, str], query_token: str = "") -> str:
    """Return the secret that a request shows, where Consul's clients put it, or an empty text."""
    if query_token:
        return query_token
    if token := headers.get("X-Consul-Token"):
        return token
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whoever shows a token."""

    accessor_id: str
    authorizer: Authorizer
    until: float | None = None
    """Seconds since the epoch at which the token expires; None: never."""


class Tokens:
    """Resolves secrets to bearers."""

    def __init__(
        self,
        backend: Backend,
        *,
        datacenter: str = "dc1",
        default_allow: bool = False,
        management_secret: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``management_secret``, if any, may do everything here, whatever the state says: an operator of this host
        can always come in."""
        self._backend, self._datacenter, self._clock = backend, datacenter, clock
        self.default = WRITE if default_allow else DENY
        self._own_hash = hash_of(management_secret) if management_secret else ""
        self._own_bearer = Bearer("", ALLOW_ALL)
        self._known: OrderedDict[str, tuple[Any, Bearer | None]] = OrderedDict()
        """By hash: what the state said, and what was made of it."""

    async def resolve(self, secret: str) -> Bearer:
        """Return the bearer of a secret; of none, the anonymous one. Raises Refused (403)."""
        if len(secret) > SECRET_CHARS_MAX:
            raise Refused(NOT_FOUND, http_status=403)
        return await self.resolve_hash(hash_of(secret) if secret else "")

    async def resolve_hash(self, hashed: str) -> Bearer:
        """As `resolve`, by the secret's hash; empty: the anonymous bearer."""
        if hashed and self._own_hash and hmac.compare_digest(hashed, self._own_hash):
            return self._own_bearer
        bearer = await self._look_up(hashed)
        if bearer is None or (bearer.until is not None and bearer.until <= self._clock()):
            raise Refused(NOT_FOUND, http_status=403)
        return bearer

    def known_now(self, hashed: str) -> Bearer | None:
        """Return the bearer, the same object as before if nothing has changed, if that can be told at once."""
        if hashed and hashed == self._own_hash:
            return self._own_bearer
        found = self._backend.query_now("acl.resolve", {"secret_hash": hashed, "datacenter": self._datacenter})
        bearer = None if found is None else self._bearer(hashed, found)
        return None if bearer is None or (bearer.until is not None and bearer.until <= self._clock()) else bearer

    async def _look_up(self, hashed: str) -> Bearer | None:
        params = {"secret_hash": hashed, "datacenter": self._datacenter}
        found = self._backend.query_now("acl.resolve", params)
        if found is not None and found.raw is not None:
            return self._bearer(hashed, found)
        known = self._known.get(hashed)
        try:
            async with asyncio.timeout(KNOWN_WAIT_S if known is not None else UNKNOWN_WAIT_S):
                found = await self._backend.query("acl.resolve", params, mode="stale")
                if found.raw is None and known is None:
                    # It may have been made a moment ago, where this node's own knowledge does not reach yet.
                    found = await self._backend.query("acl.resolve", params)
        except (NodeError, TimeoutError) as error:
            if known is not None and known[1] is not None:
                return known[1]
            log.warning("a token could not be looked up: %s", error or "the servers do not answer")
            raise Refused(
                "Permission denied: the token cannot be checked now, as no server answers; try again", http_status=403
            ) from None
        return self._bearer(hashed, found)

    def _bearer(self, hashed: str, found: QueryResult) -> Bearer | None:
        known = self._known.get(hashed)
        if known is not None and (known[0] is found.raw or known[0] == found.raw):
            self._known.move_to_end(hashed)
            return known[1]
        if found.raw is None:
            self._known.pop(hashed, None)
            return None
        bearer = bearer_of(found.decode(Grants), self.default)
        self._known[hashed] = found.raw, bearer
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return bearer

    async def until_withdrawn(self, hashed: str, still: Callable[[Bearer], bool]) -> str:
        """Return, with the reason, once the secret of this hash is no token any more or ``still`` does not hold."""
        if hashed and hashed == self._own_hash:
            await asyncio.get_running_loop().create_future()  # until cancelled: it is never withdrawn
        params = {"secret_hash": hashed, "datacenter": self._datacenter}
        index, wait_s = 0, 0.0
        while True:
            try:
                found = await self._backend.query("acl.resolve", params, mode="stale", min_index=index, wait_s=wait_s)
            except NodeError as error:
                log.debug("a held token cannot be followed now: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            index, wait_s = found.index, FOLLOW_WAIT_S
            bearer = self._bearer(hashed, found)
            if bearer is None:
                return "its token was deleted"
            if bearer.until is not None:
                wait_s = min(wait_s, bearer.until - self._clock())
                if wait_s <= 0:
                    return "its token has expired"
            if not still(bearer):
                return "its token does not grant this any more"


def tokens_of(config: ClusterConfig, backend: Backend) -> Tokens:
    """Return the tokens of a cluster, as this node sees them. Raises PkiError."""
    return Tokens(
        backend,
        datacenter=config.datacenter,
        default_allow=config.acl_default_policy == "allow",
        management_secret=load_secret(config.acl_token_file) if config.acl_token_file else "",
    )


def first_token_of(config: ClusterConfig) -> Token | None:
    """Return the management token that a cluster begins with, if its file has one. Raises PkiError."""
    if not (config.acl_enabled and config.acl_token_file):
        return None
    return Token(
        str(uuid.uuid4()),
        hash_of(load_secret(config.acl_token_file)),
        description="Initial Management Token",
        policies=(MANAGEMENT_ID,),
    )


def bearer_of(grants: Grants, default: int) -> Bearer:
    """Compile what a token stands for. Rules that this version cannot read make a bearer that may do nothing."""
    texts = [*grants.rules]
    texts += [service_rules(one.service_name) for one in grants.service_identities]
    texts += [node_rules(one.node_name) for one in grants.node_identities]
    try:
        authorizer = compile_rules((rule for text in texts for rule in parse_rules(text)), default)
    except BadRules as error:
        log.warning("token %s may do nothing: a policy of it cannot be read: %s", grants.accessor_id, error)
        authorizer = compile_rules((), DENY)
    until = None
    if grants.expiration_time:
        try:
            moment = datetime.datetime.fromisoformat(grants.expiration_time)
            until = moment.timestamp() if moment.tzinfo is not None else 0.0
        except ValueError:
            until = 0.0
    return Bearer(grants.accessor_id, authorizer, until)


def is_anonymous(bearer: Bearer) -> bool:
    """Whether no token was shown."""
    return bearer.accessor_id == ANONYMOUS_ID


class AgentTokens:
    """The tokens that an operator gave this agent to use where a question comes without one; kept on disk as hashes.

    ``default`` stands in for requests without a token, ``dns`` for questions by DNS. The agent's own work needs none:
    its certificate says what it is.
    """

    KINDS = ("default", "dns", "agent", "agent_recovery", "config_file_service_registration", "replication")
    OLD_NAMES = {
        "acl_token": "default",
        "acl_agent_token": "agent",
        "acl_agent_master_token": "agent_recovery",
        "agent_master": "agent_recovery",
        "acl_replication_token": "replication",
    }

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._hashes: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                self._hashes = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
            except (OSError, msgspec.MsgspecError) as error:
                raise PkiError(
                    f"{path} cannot be read ({error}): remove it, and set the agent's tokens anew"
                ) from None

    def hash_for(self, kind: str) -> str:
        """Return the hash of the secret to use, empty for none."""
        return self._hashes.get(kind) or self._hashes.get("default", "")

    def set(self, kind: str, secret: str) -> None:
        """Set one, durably; an empty secret clears it. Raises KeyError for an unknown kind, OSError."""
        kind = self.OLD_NAMES.get(kind, kind)
        if kind not in self.KINDS:
            raise KeyError(kind)
        hashes = {name: held for name, held in self._hashes.items() if name != kind}
        if secret:
            hashes[kind] = hash_of(secret)
        if self._path is not None:
            fresh = self._path.with_suffix(".new")
            fresh.touch(mode=0o600)
            fresh.write_bytes(msgspec.json.encode(hashes))
            fresh.replace(self._path)
        self._hashes = hashes


@dataclass(frozen=True, slots=True)
class AccessControl:
    """What a node needs to know who asks. A node without it lets everyone do everything."""

    tokens: Tokens
    agent_tokens: AgentTokens

    def hash_for(self, secret: str, kind: str = "default") -> str:
        """Return the hash of what a request shows, or of what the agent has in its place; empty: anonymous."""
        return hash_of(secret) if secret else self.agent_tokens.hash_for(kind)

    def is_still(self, bearer: Bearer, secret: str, hashed: str) -> bool:
        """Whether a request that shows ``secret``, which was of this hash, has the same bearer as before."""
        if not secret and self.agent_tokens.hash_for("default") != hashed:
            return False
        return self.tokens.known_now(hashed) is bearer

    async def bearer(self, secret: str, kind: str = "default") -> Bearer:
        """Return who shows this secret; without one, who the agent's own token stands for. Raises Refused (403)."""
        if len(secret) > SECRET_CHARS_MAX:
            raise Refused(NOT_FOUND, http_status=403)
        return await self.tokens.resolve_hash(self.hash_for(secret, kind))
