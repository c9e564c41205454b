"""Several scripted upstreams behind one relay: how a test names, starts and looks at them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .upstream import ScriptedUpstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Running

__all__ = ["configured", "look", "scripted", "transactions", "verbs"]


@contextlib.asynccontextmanager
async def scripted(count: int, **options: Any) -> AsyncIterator[list[ScriptedUpstream]]:
    """Run `count` upstreams that do as they are told."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedUpstream(**options)) for _ in range(count)]


def configured(name: str, upstream: ScriptedUpstream, **keys: Any) -> dict[str, Any]:
    """Return the settings of one upstream, to be tried by its place in the file unless `keys` say more."""
    return {"name": name, "address": upstream.address, "tls": "none", **keys}


def verbs(upstream: ScriptedUpstream) -> list[str]:
    """Return the commands of transactions that it has seen, over all connections, in their order."""
    wanted = ("MAIL", "RCPT", "DATA", "BDAT")
    return [entry.verb for entry in upstream.log if hasattr(entry, "verb") and entry.verb in wanted]


def transactions(upstream: ScriptedUpstream) -> int:
    """Return how many times it has been told MAIL."""
    return verbs(upstream).count("MAIL")


def look(running: Running, seconds: float = 0.0) -> None:
    """Let the relay look at its upstreams as if it were so many seconds later."""
    running.relay.upstreams.sweep(asyncio.get_running_loop().time() + seconds)
