"""nmap's own probes for an open relay, from an address that may relay and from one that may not.

The upstream takes everything, so it is the relay alone that refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.interop.peers import command, needs, run
from tests.support.watch import counted

if TYPE_CHECKING:
    from tests.support.upstream import ScriptedUpstream

pytestmark = needs("nmap", "nmap")

TESTS = 16
"""Combinations of MAIL and RCPT that the script tries."""


async def scan(port: int) -> str:
    """Return what the script says of a server on this port; "+" runs it off ports 25, 465 and 587 too."""
    ended = await run(
        [
            *(command("nmap"), "-Pn", "-n", "-sT", "-vv", "-p", str(port)),
            *("--script", "+smtp-open-relay", "--script-args", "smtp-open-relay.domain=example.com"),
            "127.0.0.1",
        ]
    )
    assert ended.status == 0, ended.said
    assert f"{port}/tcp open" in ended.said
    return ended.said


async def test_it_finds_no_open_relay(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, clients={"allow": ["127.0.0.9/32"]}) as running:
        said = await scan(running.port)

        assert "Server doesn't seem to be an open relay, all tests failed" in said
        assert upstream.messages == upstream.incomplete == []
        await counted(running, refused=TESTS)
        assert running.metric("client_rejects_total", reason="not_allowed") == TESTS


@pytest.mark.parametrize("allow", ["127.0.0.1/32", "127.0.0.0/8"])
async def test_from_an_allowed_address_it_gets_what_the_upstream_gives(
    start: Any, upstream: ScriptedUpstream, allow: str
) -> None:
    async with start(upstream.port, clients={"allow": [allow]}) as running:
        said = await scan(running.port)

    assert f"Server is an open relay ({TESTS}/{TESTS} tests)" in said  # nmap cannot know who is allowed
    assert upstream.messages == []


async def test_it_finds_an_open_server(upstream: ScriptedUpstream) -> None:
    said = await scan(upstream.port)

    assert f"Server is an open relay ({TESTS}/{TESTS} tests)" in said
    assert "MAIL FROM:<> -> RCPT TO:<relaytest@example.com>" in said
