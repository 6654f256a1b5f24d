"""What a request needs, and the words in which it is told that its token lacks it.

Source of the words: the errors of Consul's agent, which its clients' users search for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from aiohttp import web

from node.errors import Refused
from node.tokens import Bearer, is_anonymous
from raftstate.acl import READ, WRITE, Authorizer
from raftstate.acl.rules import INTENTION, WHOLE, word

ONE, BELOW, ALL, ANY = "one", "below", "all", "any"
"""Of a need: for that name, for all that begin with it, for every name, for at least one."""


@dataclass(frozen=True, slots=True)
class Need:
    """Access to a resource that a request cannot do without."""

    resource: str
    access: int
    name: str = ""
    scope: str = ONE
    otherwise: Need | None = None
    """What does in its place."""

    def met(self, authorizer: Authorizer) -> bool:
        """Whether the authorizer grants it, or what does in its place."""
        return self._granted(authorizer) or (self.otherwise is not None and self.otherwise.met(authorizer))

    def _granted(self, authorizer: Authorizer) -> bool:
        if self.scope == ONE:
            return authorizer.allows(self.resource, self.name, self.access)
        if self.scope == BELOW:
            return authorizer.allows_below(self.resource, self.name, self.access)
        if self.scope == ALL:
            return authorizer.allows_all(self.resource, self.access)
        return authorizer.allows_any(self.resource, self.access)


def intention_need(name: str, access: int) -> Need:
    """Return what reading or writing a service's intentions takes; ``*``: any to read, all to write."""
    if name == "*":
        return Need(INTENTION, access, "", ANY if access == READ else ALL)
    return Need(INTENTION, access, name)


def lacks(bearer: Bearer, need: Need) -> str:
    """Return Consul's text of a refusal."""
    anonymous = is_anonymous(bearer)
    who = "anonymous token" if anonymous else f"token with AccessorID '{bearer.accessor_id}'"
    text = f"Permission denied: {who} lacks permission '{need.resource}:{word(need.access)}'"
    if need.resource not in WHOLE and (need.name or need.scope == ONE):
        text += f" on {json.dumps(need.name, ensure_ascii=False)}"
    if anonymous:
        text += ". The anonymous token is used implicitly when a request does not specify a token."
    return text


BEARER = web.RequestKey("lictor.acl.bearer", Bearer)
"""Who asks; not set where access control is off, or where everyone may ask."""
NEEDS = web.RequestKey("lictor.acl.needs", tuple[Need, ...])
"""What let the request in."""
COVERED = web.RequestKey("lictor.acl.covered", bool)
"""Its endpoint's own needs are all there is: the command that it writes is not looked at again."""


def first_lacking(bearer: Bearer, needs: Iterable[Need]) -> Need | None:
    """Return the first need that is not met, or None."""
    authorizer = bearer.authorizer
    if authorizer.everything:
        return None
    for need in needs:
        if not need.met(authorizer):
            return need
    return None


def permit(request: web.Request, *needs: Need) -> None:
    """Turn the request away unless its token has all of this. Free where access control is off. Raises Refused (403).

    A request that is held open is ended when its token loses what it was let in by.
    """
    bearer = request.get(BEARER)
    if bearer is None:
        return
    if lacking := first_lacking(bearer, needs):
        raise Refused(lacks(bearer, lacking), http_status=403)
    if needs:
        request[NEEDS] = (*request.get(NEEDS, ()), *needs)


def service_write(name: str) -> Need:
    """To be, or to speak for, a service."""
    return Need("service", WRITE, name)


def node_write(name: str) -> Need:
    """To change what a node is."""
    return Need("node", WRITE, name)
