"""File descriptors: as many as the system lets this process have, and whether that is enough.

Rules: the soft limit of many systems, 1024, is for programs that use `select`; a relay may take all that the
hard limit allows. What the configuration may need beyond it is a warning, not a refusal to start.
"""

from __future__ import annotations

import contextlib
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.settings import Settings

__all__ = ["BESIDE", "raise_limit", "shortage"]

BESIDE = 128
"""Descriptors beside those of clients and upstreams: listeners, HTTP, the store, the spool, the loop."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one; return how many descriptors this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit beside this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def shortage(settings: Settings, limit: int) -> str | None:
    """What to change if so many descriptors are less than the connections that the settings allow."""
    needed = settings.server.max_connections + BESIDE
    needed += sum(upstream.max_connections for upstream in settings.upstreams)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return None
    return (
        f"max_connections of server and upstreams may need {needed} file descriptors, this process may have "
        f"{limit}: raise its hard limit (LimitNOFILE, ulimit -n), or lower max_connections"
    )
