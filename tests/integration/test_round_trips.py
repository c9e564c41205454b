"""How often a message waits for the upstream: counted, not timed.

The upstream here gives no reply before all of a group has come, and then the whole group's: a relay that
waited for a reply in the middle of a group would wait for ever. So a message that passes costs at most as
many round trips as it has groups, and the transcript shows that nothing else was said.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.support.client import Client, bdat

CONTENT = b"From: a@example.test\r\nSubject: x\r\n\r\nhello\r\n"
MAIL = b"MAIL FROM:<a@example.test>\r\n"
RCPT = b"RCPT TO:<b@example.test>\r\n"
DATA = b"DATA\r\n"
LAST = bdat(CONTENT, last=True)
OK, GO_AHEAD = b"250 2.0.0 ok\r\n", b"354 go ahead\r\n"
EHLO = b"250-upstream.test\r\n250-PIPELINING\r\n250-CHUNKING\r\n250 8BITMIME\r\n"

Group = tuple[bytes, bytes]
"""What has to come before anything is said, and what is said then."""

A_COMMAND_AT_A_TIME: list[Group] = [(MAIL, OK), (RCPT, OK), (DATA, GO_AHEAD), (CONTENT + b".\r\n", OK)]
PIPELINED: list[Group] = [(MAIL + RCPT + DATA, OK + OK + GO_AHEAD), (CONTENT + b".\r\n", OK)]


class Upstream:
    """An upstream that answers group by group, message after message, on one connection or more."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self.connections = 0
        self.said: list[bytes] = []
        """The groups that were answered."""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(b"220 upstream.test ESMTP\r\n")
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            assert (await reader.readline()).startswith(b"EHLO ")
            writer.write(EHLO)
            while True:
                for expected, reply in self._groups:
                    self.said.append(await reader.readexactly(len(expected)))
                    writer.write(reply)
        writer.close()


@contextlib.asynccontextmanager
async def answering(groups: Sequence[Group]) -> AsyncIterator[Upstream]:
    upstream = Upstream(groups)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    async with server:
        yield upstream


async def a_command_at_a_time(client: Client) -> list[int]:
    codes = [(await client.command(line)).code for line in (MAIL[:-2], RCPT[:-2], DATA[:-2])]
    await client.send(CONTENT + b".\r\n")
    return [*codes, (await client.reply()).code]


async def pipelined(client: Client) -> list[int]:
    await client.send(MAIL + RCPT + DATA)
    codes = [reply.code for reply in await client.replies(3)]
    await client.send(CONTENT + b".\r\n")
    return [*codes, (await client.reply()).code]


async def by_bdat(client: Client) -> list[int]:
    await client.send(MAIL + RCPT + LAST)
    return [reply.code for reply in await client.replies(3)]


async def with_something_behind_the_recipient(client: Client) -> list[int]:
    """What the relay answers by itself must not keep back what is before it."""
    await client.send(MAIL + RCPT + b"NOOP\r\n")
    codes = [reply.code for reply in await client.replies(3)][:2]
    codes.append((await client.command(DATA[:-2])).code)
    await client.send(CONTENT + b".\r\n")
    return [*codes, (await client.reply()).code]


BDAT: list[Group] = [(MAIL + RCPT + LAST, OK + OK + OK)]
THREE_GROUPS: list[Group] = [(MAIL + RCPT, OK + OK), (DATA, GO_AHEAD), (CONTENT + b".\r\n", OK)]
TOLD = [250, 250, 354, 250]


@pytest.mark.parametrize(
    ("sends", "groups", "told"),
    [
        pytest.param(a_command_at_a_time, A_COMMAND_AT_A_TIME, TOLD, id="four-a-command-at-a-time"),
        pytest.param(pipelined, PIPELINED, TOLD, id="two-pipelined"),
        pytest.param(by_bdat, BDAT, [250, 250, 250], id="one-by-bdat"),
        pytest.param(with_something_behind_the_recipient, THREE_GROUPS, TOLD, id="three-with-noop"),
    ],
)
async def test_round_trips_of_a_message(start: Any, sends: Any, groups: list[Group], told: list[int]) -> None:
    async with answering(groups) as upstream, start(upstream.port) as running:
        for _ in range(3):  # a connection of the client for each; the relay's to the upstream stays
            async with Client(running.port) as client:
                await client.ehlo()
                assert await sends(client) == told
                await client.quit()
        assert upstream.said == [expected for expected, _ in groups] * 3
        assert len(running.rows()) == 3
        assert upstream.connections <= 2  # the probe at the start may have one of its own
