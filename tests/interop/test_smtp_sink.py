"""Postfix's smtp-sink as the upstream: many messages, kept connections, what RSET does, blunt refusals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.interop.peers import command, daemon_directory, free_port, needs
from tests.support.client import Client
from tests.support.ledger import ID_HEADER, Ledger, check, id_of
from tests.support.watch import counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = needs("smtp-sink", "postfix")

CLIENTS = 8
MESSAGES = 40


@dataclass(frozen=True)
class Sink:
    """An smtp-sink that runs."""

    port: int
    directory: Path

    @property
    def dumps(self) -> list[bytes]:
        """The messages that it took, each with lines of smtp-sink's own before it."""
        return [path.read_bytes() for path in sorted(self.directory.glob("dump/*"))]

    @property
    def commands(self) -> list[str]:
        """The commands that it saw, with their arguments, over all connections, in order."""
        log = (self.directory / "log").read_text()
        return re.findall(
            r"^\S*smtp-sink: ((?:(?:EHLO|HELO|MAIL|RCPT|DATA|RSET|QUIT)\b.*|\.))$", log, re.MULTILINE
        )


@contextlib.asynccontextmanager
async def sink(*options: str) -> AsyncIterator[Sink]:
    """Run smtp-sink with `options`; it keeps every message and logs every command."""
    with daemon_directory() as directory:
        (directory / "dump").mkdir(mode=0o777)
        (directory / "dump").chmod(0o777)
        found = Sink(free_port(), directory)
        # As root it wants to be told whom to become.
        user = ["-u", "postfix"] if os.geteuid() == 0 else []
        arguments = [command("smtp-sink"), "-v", *user, "-h", "sink.test", *options]
        arguments += ["-d", f"{directory}/dump/", f"127.0.0.1:{found.port}", "100"]
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            await _listens(found, process)
            yield found
        finally:
            process.terminate()
            async with asyncio.timeout(10):
                await process.wait()


async def _listens(found: Sink, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(10):
        while "trying... [127.0.0.1]" not in (found.directory / "log").read_text():
            assert process.returncode is None, (found.directory / "log").read_text()
            await asyncio.sleep(0.02)


def content(key: str) -> bytes:
    return b"%b: %b\r\nSubject: x\r\n\r\ntext\r\n..\r\n" % (ID_HEADER.encode(), key.encode())


def body_of(dump: bytes) -> bytes:
    """Return the message in a dump with the line ends of the wire; smtp-sink adds an empty line."""
    header = ID_HEADER.encode()
    return (header + dump.partition(header)[2].removesuffix(b"\n")).replace(b"\n", b"\r\n")


async def test_many_messages_over_kept_connections(start: Any) -> None:
    async def send(port: int, who: int, told: dict[str, int | None]) -> None:
        async with Client(port) as client:
            await client.ehlo()
            for number in range(MESSAGES):
                key = f"{who}-{number}"
                replies = await client.message(
                    "a@example.test", [f"{key}@example.test"], content(key), pipelined=number % 2 == 0
                )
                told[key] = replies[-1].code
            await client.quit()

    told: dict[str, int | None] = {}
    upstream = {"max_connections": 4, "max_messages": 50}
    async with sink() as found, start(found.port, upstream=upstream) as running:
        async with asyncio.TaskGroup() as group:
            for who in range(CLIENTS):
                group.create_task(send(running.port, who, told))

        assert set(told.values()) == {250}
        dumps = found.dumps
        accepted = [id_of(body_of(dump)) for dump in dumps]
        rows = [row["client_task_id"] for row in running.rows()]
        assert check(Ledger(told=told, accepted=accepted, rows=rows)) == []
        assert len(told) == CLIENTS * MESSAGES
        assert all(body_of(dump) == content(id_of(body_of(dump))) for dump in dumps)
        opened = running.metric("upstream_connects_total", upstream="primary", outcome="ok")
        # One for each 50 messages, and what more the clients need at the same time.
        assert CLIENTS * MESSAGES / 50 <= opened <= CLIENTS * MESSAGES / 50 + 4
        assert found.commands.count("RSET") == 0


async def test_a_transaction_given_up_is_reset_and_its_connection_used_again(start: Any) -> None:
    async with sink() as found, start(found.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command("MAIL FROM:<given-up@example.test>", 250)
        await client.command("RCPT TO:<x@example.test>", 250)
        await client.command("RSET", 250)
        # The client has not waited for the upstream's reply to RSET; until it comes, the connection is taken.
        async with asyncio.timeout(10):
            while not running.metric("upstream_reply_seconds_count", upstream="primary", command="rset"):
                await asyncio.sleep(0.01)
        assert (await client.message("a@example.test", ["b@example.test"], content("1")))[-1].code == 250
        assert found.commands == [
            "EHLO relay.test",
            "MAIL FROM:<given-up@example.test>",
            "RCPT TO:<x@example.test>",
            "RSET",
            "MAIL FROM:<a@example.test>",
            "RCPT TO:<b@example.test>",
            "DATA",
            ".",
        ]
        assert len(found.dumps) == len(running.rows()) == 1


async def test_one_command_at_a_time_where_pipelining_is_not_offered(start: Any) -> None:
    async with (
        sink("-p", "-E", "-N", "-8") as found,
        start(found.port) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        assert set(client.extensions) == {"LIMITS", "PIPELINING", "SIZE"}
        replies = await client.message(
            "a@example.test", ["b@example.test", "c@example.test"], content("1"), pipelined=True
        )
        assert [reply.code for reply in replies] == [250, 250, 250, 354, 250]
        assert len(found.dumps) == len(running.rows()) == 1


async def test_an_upstream_without_esmtp(start: Any) -> None:
    """It does not know EHLO; the relay can only say HELO, and offers what it can do on its own."""
    async with (
        sink("-e", "-f", "EHLO") as found,
        start(found.port) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        assert set(client.extensions) == {"LIMITS", "PIPELINING", "SIZE"}
        assert (await client.message("a@example.test", ["b@example.test"], content("1")))[-1].code == 250
        assert len(found.dumps) == len(running.rows()) == 1


@pytest.mark.parametrize(
    ("options", "codes", "outcome"),
    [
        (("-f", "MAIL"), [500], "rejected"),
        (("-r", "MAIL"), [450], "deferred"),
        (("-Q", "MAIL"), [451], "unavailable"),
        (("-q", "MAIL"), [451], "unavailable"),
        (("-f", "RCPT"), [250, 500], "rejected"),
        (("-r", "RCPT"), [250, 450], "deferred"),
        (("-q", "RCPT"), [250, 451], "unavailable"),
        (("-f", "DATA"), [250, 250, 500], "rejected"),
        (("-Q", "DATA"), [250, 250, 451], "unavailable"),
        (("-f", "."), [250, 250, 354, 500], "rejected"),
        (("-r", "."), [250, 250, 354, 450], "deferred"),
        (("-Q", "."), [250, 250, 354, 451], "deferred"),
        (("-q", "."), [250, 250, 354, 451], "in_doubt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
async def test_refusals_and_hang_ups(
    options: tuple[str, ...], codes: list[int], outcome: str, start: Any
) -> None:
    async with sink(*options) as found, start(found.port) as running:
        async with Client(running.port) as client:
            await client.ehlo()
            told = [(await client.command("MAIL FROM:<a@example.test>")).code]
            if told == [250]:
                told.append((await client.command("RCPT TO:<b@example.test>")).code)
            if told == [250, 250]:
                told.append((await client.command("DATA")).code)
            if told[-1] == 354:
                await client.send(content("1") + b".\r\n")
                told.append((await client.reply()).code)
            assert told == codes
            await client.quit()
        await counted(running, **{outcome: 1})
        assert running.rows() == []
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 0


async def test_a_refusal_in_the_middle_of_the_content(start: Any) -> None:
    """smtp-sink -A: 550 soon after the 354, then nothing is read any more.

    Once the end of data has gone up, the 550 is the verdict; before that, it is a reply that nobody awaits.
    """
    async with sink("-A", "0") as found, start(found.port) as running, Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], content("1"))
        assert replies[-1].code in (451, 550)
        assert running.rows() == []
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 0
