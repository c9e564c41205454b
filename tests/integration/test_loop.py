"""A message that has passed too many relays goes no further (RFC 5321 6.3)."""

from __future__ import annotations

from typing import Any

import pytest

from relay.answers import MAX_RECEIVED
from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream

RECEIVED = b"Received: from a.test by b.test; Mon, 23 Nov 2026 08:00:00 +0000\r\n"


@pytest.mark.parametrize(("fields", "code", "counted"), [(MAX_RECEIVED, 250, 0), (MAX_RECEIVED + 1, 554, 1)])
async def test_a_loop_is_refused_and_counted(
    start: Any, upstream: ScriptedUpstream, fields: int, code: int, counted: int
) -> None:
    async with start(upstream.port) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], RECEIVED * fields + b"\r\n")
            assert replies[-1].code == code
        assert running.metric("client_rejects_total", reason="loop") == counted
        assert running.metric("messages_total", upstream="none", outcome="refused") == counted
        assert len(running.rows()) == 1 - counted
