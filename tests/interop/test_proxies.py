"""haproxy in front of the relay: the client behind it is the one that policy, log and row speak of."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from relay.session.proxy import Header, Result
from tests.interop.peers import daemon_directory, free_port, listening, needs
from tests.support.client import Client
from tests.support.upstream import EXTENSIONS, ScriptedUpstream
from tests.support.watch import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = needs("haproxy", "haproxy")

CONTENT = b"Subject: one\r\n\r\ntext\r\n"
ALLOWED, REFUSED = "127.0.0.5", "127.0.0.6"
"""Two clients. haproxy itself comes from 127.0.0.1: who takes its address for the client's fails here."""

BEHIND_A_PROXY: dict[str, Any] = {
    "listeners": [{"address": "127.0.0.1:0", "proxy_protocol": True}],
    "clients": {"trusted_proxies": ["127.0.0.1/32"], "allow": [f"{ALLOWED}/32", "::1/128"]},
}

# Nothing of the system's configuration. `check` makes haproxy open connections of its own to the relay: with
# send-proxy-v2 their header says LOCAL, with send-proxy UNKNOWN or its own addresses.
CONFIGURATION = """\
global
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend smtp
    bind 127.0.0.1:{port}
    bind [::1]:{port}
    default_backend relay
backend relay
    server relay 127.0.0.1:{relay} {options}
"""


@contextlib.asynccontextmanager
async def haproxy(relay: int, options: str) -> AsyncIterator[int]:
    """Run haproxy in front of the relay at port `relay`, and return the port where it takes clients."""
    port = free_port()
    with daemon_directory() as directory:
        configuration = directory / "haproxy.cfg"
        configuration.write_text(CONFIGURATION.format(port=port, relay=relay, options=options))
        async with listening(port, "haproxy", "-f", str(configuration), "-db"):
            yield port


OPTIONS = {
    "v1": "send-proxy",
    "v2": "send-proxy-v2",
    "v2 with TLVs": "send-proxy-v2 proxy-v2-options crc32c,unique-id",
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
async def test_the_client_behind_haproxy_is_the_client(options: str, start: Any) -> None:
    extensions = [*EXTENSIONS, "XFORWARD ADDR PORT"]
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        start(upstream.port, upstream={"xforward": True}, **BEHIND_A_PROXY) as running,
        haproxy(running.port, options) as port,
    ):
        async with Client(port, source=ALLOWED) as client:
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert [reply.code for reply in replies] == [250, 250, 354, 250]
            (told,) = [line for line in upstream.connections[0].lines if line.startswith(b"XFORWARD")]
            assert told == b"XFORWARD PORT=%b ADDR=127.0.0.5" % client.address.rpartition(":")[2].encode()
        assert [row["client"] for row in running.rows()] == [ALLOWED]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
async def test_a_client_behind_haproxy_has_no_rights_of_haproxys(
    options: str, start: Any, upstream: ScriptedUpstream
) -> None:
    """Although 127.0.0.1, where haproxy connects from, may relay."""
    over = {**BEHIND_A_PROXY, "clients": {**BEHIND_A_PROXY["clients"], "allow": ["127.0.0.1/32"]}}
    async with (
        start(upstream.port, **over) as running,
        haproxy(running.port, options) as port,
        Client(port, source=REFUSED) as client,
    ):
        await client.ehlo()
        await client.command("MAIL FROM:<a@example.test>", 550)
    assert upstream.messages == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
async def test_a_client_by_ipv6_behind_haproxy(options: str, start: Any, upstream: ScriptedUpstream) -> None:
    async with (
        start(upstream.port, **BEHIND_A_PROXY) as running,
        haproxy(running.port, options) as port,
        Client(port, host="::1") as client,
    ):
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        assert [row["client"] for row in running.rows()] == ["::1"]


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
async def test_health_checks_of_haproxy_find_the_relay_well(
    version: str, start: Any, upstream: ScriptedUpstream
) -> None:
    """haproxy takes a relay that does not greet its checks out of service, and clients hear nothing."""
    options = f"{version} check check-send-proxy inter 100ms fall 1 rise 1"
    async with (
        start(upstream.port, **BEHIND_A_PROXY) as running,
        haproxy(running.port, f"{options}\n    option smtpchk EHLO check.test") as port,
    ):
        # Some checks, of which one that failed would have been enough.
        await eventually(lambda: running.metric("client_sessions_total", listener="127.0.0.1:0") > 5)
        async with Client(port, source=ALLOWED) as client:
            await client.ehlo()
            await client.command("MAIL FROM:<a@example.test>", 250)


async def test_without_a_header_nobody_is_greeted(start: Any, upstream: ScriptedUpstream) -> None:
    async with (
        start(upstream.port, **BEHIND_A_PROXY) as running,
        haproxy(running.port, "") as port,
        Client(port, source=ALLOWED) as client,
    ):
        with pytest.raises(ConnectionError, match="closed after b''"):
            await client.command("EHLO client.test")


async def test_haproxy_at_an_address_that_is_not_trusted(start: Any, upstream: ScriptedUpstream) -> None:
    clients = {**BEHIND_A_PROXY["clients"], "trusted_proxies": ["192.0.2.0/24"]}
    async with (
        start(upstream.port, **{**BEHIND_A_PROXY, "clients": clients}) as running,
        haproxy(running.port, "send-proxy-v2") as port,
        Client(port, source=ALLOWED) as client,
    ):
        with pytest.raises(ConnectionError, match="closed after b''"):
            await client.greeting()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("host", "source"), [("127.0.0.1", ALLOWED), ("::1", "::1")])
async def test_what_haproxy_writes_is_what_the_relay_reads(host: str, source: str, options: str) -> None:
    """Its headers alone, without a relay behind it."""
    found: asyncio.Queue[Result | None] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.put_nowait(Header().feed(await reader.read(4096)))
        writer.close()

    async with (
        await asyncio.start_server(take, "127.0.0.1", 0) as server,
        haproxy(server.sockets[0].getsockname()[1], options) as port,
        Client(port, host=host, source=source) as client,
    ):
        async with asyncio.timeout(10):
            while (
                (result := await found.get()) is None
                or result.source is None
                or (result.source.port != int(client.address.rpartition(":")[2]))
            ):
                pass  # whoever looked whether haproxy listens
        assert str(result.source.address) == source
        assert result.rest == b""
