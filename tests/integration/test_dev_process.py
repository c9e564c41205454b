"""`relay serve --dev` as a process: it starts whoever has its upstream's usual port, and keeps what it got.

These tests take no port for themselves alone: whoever has the usual one while they run, a test beside them or
somebody else on this machine, all must hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import smtplib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.settings import DEV_UPSTREAM
from relay.settings.address import Address
from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.supervisor import Supervisor

USUAL = Address.parse(DEV_UPSTREAM)
NOBODYS_PORT = 1
"""Of the upstream that the files name: with --dev it is not used."""


@pytest.fixture
def taken() -> Iterator[None]:
    """Somebody listens at the usual port: this test, or who was there before."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server((USUAL.host, USUAL.port)))
        yield


def trial(directory: Path) -> RelayProcess:
    directory.mkdir(exist_ok=True)
    relay = RelayProcess(directory, NOBODYS_PORT)
    relay.options = ("--dev",)
    return relay


async def upstream_of(relay: RelayProcess) -> Address:
    """Return where the built-in upstream is, as the log says."""
    (upstream,) = (await relay.event("started"))["upstreams"]
    return Address.parse(upstream.removeprefix("dev "))


async def send(relay: RelayProcess) -> str:
    async with Client(relay.port, deadline_s=30.0) as client:
        await client.ehlo()
        reply = (await client.message("a@example.com", ["b@example.org"], b"\r\ntext\r\n"))[-1]
    assert reply.code == 250, reply
    return str(reply)


@pytest.mark.usefixtures("taken")
async def test_it_runs_beside_whoever_has_the_usual_port(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        await relay.start()
        upstream = await upstream_of(relay)
        assert (upstream.host, upstream.port) != (USUAL.host, USUAL.port)
        assert "kept as dev-1" in await send(relay)
        assert await relay.terminate() == 0
    assert relay.errors() == ""


async def test_those_that_start_in_one_moment_all_run(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(trial(tmp_path / str(number))) for number in range(4)]
        await asyncio.gather(*(relay.start() for relay in relays))
        upstreams = [(await upstream_of(relay)).port for relay in relays]
        assert len(set(upstreams)) == len(relays)
        for relay in relays:
            assert "kept as dev-1" in await send(relay)
        for relay in relays:
            assert await relay.terminate() == 0
            assert relay.errors() == ""


async def test_a_reload_keeps_its_upstream(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        await relay.start()
        assert "kept as dev-1" in await send(relay)
        relay.write(relay.text(server={"max_recipients": 7}, upstream={"address": "127.0.0.1:2"}))
        lines = await relay.reload()
        assert lines[-1]["event"] == "reloaded"
        assert lines[-1]["changed"] == ["server.max_recipients"]
        assert "kept as dev-2" in await send(relay)
        assert await relay.terminate() == 0


async def test_a_socket_that_was_passed_stays_the_listeners(tmp_path: Path) -> None:
    """The upstream's own socket comes to lie behind the descriptors of the supervisor."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with Supervisor(smtp=listening) as supervisor:
        async with trial(tmp_path) as relay:
            supervisor.adopt(relay)
            relay.write(relay.text(listener={"address": f"127.0.0.1:{port}"}))
            for _ in range(2):
                await relay.start()
                assert relay.port == port
                assert (await upstream_of(relay)).port != port
                assert "kept as dev-1" in await send(relay)
                assert await relay.terminate() == 0
        assert relay.errors() == ""


async def test_it_does_as_the_recipient_asks(tmp_path: Path) -> None:
    """In the event loop that the relay runs on, which need not be that of the tests."""
    heard = {}
    async with trial(tmp_path) as relay:
        await relay.start()
        async with Client(relay.port, deadline_s=30.0) as client:
            await client.ehlo()
            for word in ("ann", "reject", "defer", "spam", "drop", "slow"):
                replies = await client.message("a@example.com", [f"{word}@example.org"], b"\r\ntext\r\n")
                heard[word] = [reply.code for reply in replies]
                await client.command("RSET")
        assert [doubt["sender"] for doubt in relay.rows("SELECT * FROM task_in_doubt")] == ["a@example.com"]
        assert await relay.terminate() == 0
    assert heard == {
        "ann": [250, 250, 354, 250],
        "reject": [250, 550, 503],
        "defer": [250, 451, 503],
        "spam": [250, 250, 354, 554],
        "drop": [250, 250, 354, 451],
        "slow": [250, 250, 354, 250],
    }


async def test_any_login_is_passed_through_to_it(tmp_path: Path) -> None:
    async with trial(tmp_path) as relay:
        relay.write(relay.text(clients={"auth": "passthrough", "auth_without_tls": True}))
        await relay.start()
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=30.0) as client:
            for mechanism in ("PLAIN", "LOGIN"):
                client.ehlo()
                assert mechanism in client.esmtp_features["auth"].split()
            assert await asyncio.to_thread(client.login, "ann@example.com", "sesame") == (
                235,
                b"2.7.0 Authentication successful",
            )
            await asyncio.to_thread(client.sendmail, "a@example.com", ["b@example.org"], b"\r\ntext\r\n")
        assert [row["client"] for row in relay.rows("SELECT * FROM task_done")] == ["ann@example.com"]
        assert await relay.terminate() == 0
    assert relay.errors() == ""
    assert "sesame" not in relay.log_file.read_text()
