"""The limit of open descriptors: each connection is one, and what most systems let a process have is 1,024."""

from __future__ import annotations

import errno
import logging
import resource

log = logging.getLogger("lictor.proxy")

OUR_OWN_WANT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))
"""Errors of a connection that say nothing of the other side: this process or host has nothing left to make one of."""


def raise_limit() -> int:
    """Let this process have as many descriptors as it may; return how many it might have until now.

    A program that it starts is to be given that limit back (:func:`lower_limit`): one that uses ``select`` can't deal
    with more than 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays at %d: %s", soft, error)
    return soft


def lower_limit(soft: int) -> None:
    """Let this process have ``soft`` descriptors; for a child between its fork and its program."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
