"""BDAT to BDAT (RFC 3030): chunks go up as they come, the last one ends a message as the end of data does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Client, bdat
from tests.support.upstream import CHUNKING, EXTENSIONS, ScriptedUpstream
from tests.support.watch import counted, nothing_left

if TYPE_CHECKING:
    from tests.conftest import Running

CONTENT = b"Subject: one\r\nX-Task-ID: 7\r\n\r\n.text\r\n.\r\nMAIL FROM:<evil@foreign.test>\r\n"
FIRST, SECOND, THIRD = CONTENT[:20], CONTENT[20:-9], CONTENT[-9:]
MAIL, RCPT = b"MAIL FROM:<a@example.test>\r\n", b"RCPT TO:<b@example.test>\r\n"


@pytest.fixture(params=["pipelining", "one by one"])
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedUpstream]:
    """An upstream with CHUNKING and BINARYMIME; without PIPELINING it takes one chunk at a time."""
    extensions = [*EXTENSIONS, *CHUNKING]
    if request.param != "pipelining":
        extensions.remove("PIPELINING")
    async with ScriptedUpstream(extensions=extensions) as server:
        yield server
        assert server.violations == []


async def test_chunks_go_up_as_they_came(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        assert {"CHUNKING", "BINARYMIME"} <= client.extensions.keys()
        for command in (MAIL, RCPT, bdat(FIRST), bdat(SECOND)):
            await client.send(command)
            await client.expect(250)
        await client.send(bdat(THIRD, last=True))
        assert str(await client.reply()) == "250 2.0.0 accepted as 1"
        await recorded(running, upstream)
        assert upstream.messages[0].chunks == [len(FIRST), len(SECOND), len(THIRD)]
        await client.quit()
        await nothing_left(running)


async def test_one_segment_and_octet_by_octet(start: Any, upstream: ScriptedUpstream) -> None:
    wire = MAIL + RCPT + bdat(FIRST) + bdat(b"") + bdat(SECOND + THIRD, last=True) + b"QUIT\r\n"
    async with start(upstream.port) as running:
        for step in (len(wire), 1):
            async with Client(running.port) as client:
                await client.ehlo()
                for at in range(0, len(wire), step):
                    await client.send(wire[at : at + step])
                    await asyncio.sleep(0)
                assert [reply.code for reply in await client.replies(6)] == [250] * 5 + [221]
                await client.expect_eof()
        assert [message.content for message in upstream.messages] == [CONTENT] * 2
        await counted(running, accepted=2)
        await nothing_left(running)


async def recorded(running: Running, upstream: ScriptedUpstream) -> None:
    """One message came whole, has its row, and is counted."""
    (message,) = upstream.messages
    assert message.content == CONTENT
    (row,) = running.rows()
    assert (row["size"], row["client_task_id"]) == (len(CONTENT), "7")
    assert row["upstream_reply"] == (message.reply or b"").decode().strip()
    await counted(running, accepted=1)
    assert running.metric("message_bytes_total", direction="in") == len(CONTENT)
    assert running.metric("message_bytes_total", direction="out") == len(CONTENT)
