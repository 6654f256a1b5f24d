"""What a verb on the command line (``lictor intentions create -verb …``) permits.

``tcp`` and ``any`` permit the connection whatever it carries (an L4 ``allow``); ``http`` permits every HTTP request
and nothing that is not HTTP; a list of methods such as ``GET,POST`` permits requests with these methods.
"""

from __future__ import annotations

from raftstate.model.intention import ALLOW, HTTPMatch, Permission

L4_VERBS = ("tcp", "any")
HTTP_VERB = "http"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
"""RFC 9110, section 9, and RFC 5789; without CONNECT, which a sidecar refuses always."""


def verbs_to_permissions(verb: str) -> tuple[Permission, ...]:
    """Return the permissions that ``verb`` stands for; none means that the intention is an L4 ``allow``.

    Raises :class:`ValueError` with a text that names the verbs there are.
    """
    words = [word.strip() for word in verb.split(",")]
    if len(words) == 1 and words[0].lower() in L4_VERBS:
        return ()
    if len(words) == 1 and words[0].lower() == HTTP_VERB:
        return (Permission(action=ALLOW, http=HTTPMatch(path_prefix="/")),)
    methods = tuple(dict.fromkeys(word.upper() for word in words))
    unknown = [word for word in words if word.upper() not in METHODS]
    if unknown:
        raise ValueError(
            f"unknown verb {unknown[0]!r}: use http (any HTTP request), a list of methods out of "
            f"{', '.join(METHODS)} (such as GET,POST), or tcp or any (the whole connection); "
            "http, tcp and any stand alone"
        )
    return (Permission(action=ALLOW, http=HTTPMatch(path_prefix="/", methods=methods)),)
