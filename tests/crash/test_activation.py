"""Sockets that a supervisor passes: relays come and go, and no connection is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.supervisor import Supervisor
from tests.support.upstream import ScriptedUpstream

RESTARTS = int(os.environ.get("RESTARTS", "6"))
CLIENTS = 20


@dataclass
class Callers:
    """Applications that never stop connecting; each message is sent until it is told 250."""

    port: int
    met: Counter[str] = field(default_factory=Counter)
    """What came of connections: served, told 421, refused, reset, gone."""
    yes: list[str] = field(default_factory=list)
    over: bool = False

    async def call(self, number: int) -> None:
        """Send one message after the other, most over a connection of its own."""
        sent = 0
        while not self.over:
            key = f"{number}-{sent}"
            if await self._try(key, keep=sent % 5 == 0):
                self.yes.append(key)
                sent += 1

    async def _try(self, key: str, *, keep: bool) -> bool:
        try:
            client = await Client.connect(self.port)
        except ConnectionRefusedError:
            self.met["refused"] += 1
            return False
        except ConnectionError:
            self.met["reset"] += 1
            return False
        client.deadline_s = 60.0
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(client.__aexit__)
            try:
                greeting = await client.reply()
            except ConnectionError:
                self.met["reset"] += 1
                return False
            self.met["served" if greeting.code == 220 else f"told {greeting.code}"] += 1
            if greeting.code != 220:
                return False
            try:
                if (await client.command("EHLO a.test")).code == 421:
                    return False
                told = await self._send(client, key)
                if told and keep:  # stay, and hear the 421 or nothing
                    await asyncio.sleep(0.05)
            except ConnectionError:
                self.met["gone"] += 1
                return False
            return told

    async def _send(self, client: Client, key: str) -> bool:
        content = b"From: a@example.test\r\nX-Task-ID: %b\r\n\r\ntext\r\n" % key.encode()
        for line, code in ((b"MAIL FROM:<a@example.test>", 250), (b"RCPT TO:<b@example.test>", 250)):
            reply = await client.command(line)
            if reply.code == 421:
                return False
            assert reply.code == code, reply
        await client.command(b"DATA", 354)
        await client.send(content + b".\r\n")
        await client.expect(250)
        return True


def tcp() -> socket.socket:
    found = socket.create_server(("127.0.0.1", 0), backlog=4096)
    found.setblocking(False)
    return found


def address(listening: socket.socket) -> str:
    return f"127.0.0.1:{listening.getsockname()[1]}"


async def test_restarts_without_a_refused_connection(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    listening = tcp()
    with Supervisor(smtp=listening) as supervisor:
        callers = Callers(listening.getsockname()[1])
        async with RelayProcess(tmp_path, upstream.port, listener={"address": address(listening)}) as relay:
            supervisor.adopt(relay)
            async with asyncio.TaskGroup() as group:
                await relay.start()
                for number in range(CLIENTS):
                    group.create_task(callers.call(number))
                for _ in range(RESTARTS):
                    enough = len(callers.yes) + 2 * CLIENTS
                    while len(callers.yes) < enough:
                        await asyncio.sleep(0.01)
                    assert await relay.terminate() == 0
                    await relay.start()
                callers.over = True
            assert await relay.terminate() == 0
            rows = [row["client_task_id"] for row in relay.rows()]
            print(f"{RESTARTS} restarts, {len(callers.yes)} messages told 250, {dict(callers.met)}")
            assert (callers.met["refused"], callers.met["reset"], callers.met["gone"]) == (0, 0, 0)
            assert sorted(rows) == sorted(callers.yes)
            assert len(upstream.accepted) == len(rows)
            assert relay.errors() == ""


async def test_a_socket_is_served_by_the_listener_that_names_its_address(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    path = tmp_path / "relay.sock"
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(str(path))
    unix.listen()
    with Supervisor(local=unix) as supervisor:
        relay = RelayProcess(tmp_path, upstream.port, listener={"address": f"unix:{path}"})
        async with relay:
            supervisor.adopt(relay)
            for _ in range(2):
                await relay.spawn()
                line = await relay.event("started")
                assert line["listeners"] == [f"unix:{path}"]
                reader, writer = await asyncio.open_unix_connection(str(path))
                assert (await reader.readline()).startswith(b"220 ")
                writer.close()
                await writer.wait_closed()
                await asyncio.to_thread(relay_environment, relay)
                assert await relay.terminate() == 0
                assert path.exists()  # the supervisor's: the next one needs it


def relay_environment(relay: RelayProcess) -> None:
    """/proc shows what the process was started with; its children must not be given it."""
    assert b"LISTEN_FDS=1" in Path(f"/proc/{relay.pid}/environ").read_bytes()


async def fails(relay: RelayProcess) -> str:
    await relay.spawn()
    assert await relay.ended() == 1
    (line,) = relay.errors().splitlines()
    return line


async def test_a_socket_that_no_listener_names(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    listening = tcp()
    with Supervisor(smtp=listening) as supervisor:
        async with RelayProcess(tmp_path, upstream.port) as relay:
            supervisor.adopt(relay)
            assert await fails(relay) == (
                "relay: cannot start: no listener is configured for the socket that was passed: "
                + address(listening)
            )


@pytest.mark.parametrize("kind", ["datagram", "connected"])
async def test_a_socket_of_another_kind(kind: str, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    if kind == "datagram":
        wrong = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        wrong.bind(("127.0.0.1", 0))
    else:
        wrong = socket.create_connection(("127.0.0.1", upstream.port))
    with Supervisor(odd=wrong) as supervisor:
        async with RelayProcess(tmp_path, upstream.port) as relay:
            supervisor.adopt(relay)
            assert "descriptor 3 (odd) that was passed by LISTEN_FDS is no listening stream socket" in (
                await fails(relay)
            )


async def test_the_supervisor_hears_of_start_reload_and_stop(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with Supervisor() as supervisor:
        async with RelayProcess(tmp_path, upstream.port) as relay:
            supervisor.adopt(relay, watchdog_s=0.2)
            await relay.start()
            ready = await supervisor.told("READY", "1")
            assert ready["STATUS"] == f"listening on 127.0.0.1:{relay.port}"
            await supervisor.told("WATCHDOG", "1", times=5)
            assert (await relay.reload())[-1]["event"] == "reloaded"
            reloading = await supervisor.told("RELOADING", "1")
            assert int(reloading["MONOTONIC_USEC"]) > 0
            await supervisor.told("READY", "1", times=2)
            relay.write("[server]\nhostnam = 1\n")
            assert (await relay.reload())[-1]["event"] == "reload refused"
            await supervisor.told("READY", "1", times=3)
            assert await relay.terminate() == 0
            await supervisor.told("STOPPING", "1")
        told = [next(iter(state)) for state in supervisor.listen() if "WATCHDOG" not in state]
        assert told == ["READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING"]


async def test_a_supervisor_that_does_not_listen_costs_nothing(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        relay.environment["NOTIFY_SOCKET"] = str(tmp_path / "nobody")
        await relay.start()
        async with Client(relay.port) as client:
            await client.ehlo()
        assert await relay.terminate() == 0
        (line,) = (line for line in relay.log() if line["event"] == "warning")
        assert "the service manager cannot be told" in line["text"]


async def test_two_relays_share_a_port_while_one_takes_over(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """SO_REUSEPORT: what the kernel has connected for the one that goes is still answered."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        callers = Callers(port)
        async with contextlib.AsyncExitStack() as stack:
            relays = []
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
                relay = RelayProcess(
                    tmp_path / name,
                    upstream.port,
                    server={"reuse_port": True},
                    listener={"address": f"127.0.0.1:{port}"},
                )
                relays.append(await stack.enter_async_context(relay))
            await relays[0].start()
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(callers.call(number))
                for turn in range(RESTARTS):
                    enough = len(callers.yes) + 2 * CLIENTS
                    while len(callers.yes) < enough:
                        await asyncio.sleep(0.01)
                    await relays[(turn + 1) % 2].start()
                    assert await relays[turn % 2].terminate() == 0
                callers.over = True
            assert await relays[RESTARTS % 2].terminate() == 0
            rows = [row["client_task_id"] for relay in relays for row in relay.rows()]
            print(f"{RESTARTS} restarts, {len(callers.yes)} messages told 250, {dict(callers.met)}")
            assert sorted(rows) == sorted(callers.yes)
            assert callers.met["refused"] == 0
            assert callers.met["gone"] == 0
