"""BDAT to BDAT (RFC 3030): chunks go up as they come, the last one ends a message as the end of data does."""

from __future__ import annotations

import asyncio
import json
import smtplib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from relay import transaction as transaction_module
from relay.session import content as content_module
from relay.session import dialogue as dialogue_module
from tests.support.client import Client, Reply, bdat
from tests.support.upstream import (
    CHUNKING,
    EXTENSIONS,
    AfterOctets,
    Close,
    Delay,
    Garbage,
    HalfReply,
    Reset,
    ScriptedUpstream,
    Silence,
    StopReading,
)
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from tests.conftest import Running
    from tests.support.connection import Connection

CONTENT = b"Subject: one\r\nX-Task-ID: 7\r\n\r\n.text\r\n.\r\nMAIL FROM:<evil@foreign.test>\r\n"
FIRST, SECOND, THIRD = CONTENT[:20], CONTENT[20:-9], CONTENT[-9:]
MAIL, RCPT = b"MAIL FROM:<a@example.test>\r\n", b"RCPT TO:<b@example.test>\r\n"


LOOKS = {"idle_timeout": "400ms"}
"""Waits are looked at four times within the shortest one."""


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


@pytest.mark.parametrize(("missing", "accepted"), [(0, 1), (1, 0)])
async def test_fin_right_behind_the_last_octet(
    missing: int, accepted: int, start: Any, upstream: ScriptedUpstream
) -> None:
    """What was said before FIN is done; a message that is not complete is none."""
    wire = MAIL + RCPT + bdat(FIRST) + bdat(SECOND + THIRD, last=True)
    async with start(upstream.port) as running:
        async with Client(running.port) as client:
            await client.ehlo()
            await client.send(wire[: len(wire) - missing])
            client.half_close()
            said = await client.expect_closed()
        assert said.endswith(b"250 2.0.0 accepted as 1\r\n") is bool(accepted)
        await counted(running, **{"accepted" if accepted else "aborted": 1})
        assert len(running.rows()) == len(upstream.messages) == accepted
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


async def begun(client: Client) -> None:
    """Open a transaction with one accepted recipient."""
    await client.ehlo()
    for command in (MAIL, RCPT):
        await client.send(command)
        await client.expect(250)


async def next_message_passes(client: Client, running: Running, upstream: ScriptedUpstream) -> None:
    before = len(upstream.messages)
    upstream.script = {}
    assert (await client.command("RSET")).code == 250
    replies = await client.chunks("a@example.test", ["b@example.test"], [FIRST, SECOND + THIRD])
    assert [reply.code for reply in replies] == [250] * 4
    (message,) = upstream.messages[before:]
    assert (message.content, message.accepted) == (CONTENT, True)
    await client.quit()
    await nothing_left(running)
    assert len(running.rows()) == len(upstream.accepted)


# The upstream fails, in the middle of a transaction of two chunks.

CHUNK, LAST = b"x" * 40_000 + b"\r\n", b"y" * 40_000 + b"\r\n"
FAILURES = {
    "4yz": b"450 4.7.9 not now\r\n",
    "5yz": b"550 5.7.9 never\r\n",
    "421": Close(b"421 4.3.2 going down\r\n"),
    "close": Close(),
    "reset": Reset(),
    "silence": Silence(),
    "garbage": Garbage(),
    "half a reply": HalfReply(),
    "354": b"354 go ahead\r\n",
}
LOST = "451 4.4.2 The upstream server closed the connection or did not answer, try again later"
DOUBT = "451 4.4.2 The upstream server did not answer: the message may have been sent, see"
# stage, failure -> the replies to both chunks, the outcome, when the client waits for each reply ...
WAITS = {
    ("BDAT", "4yz"): ("450 4.7.9 not now", "503 5.5.1 a chunk was refused", "deferred"),
    ("BDAT", "5yz"): ("550 5.7.9 never", "503 5.5.1 a chunk was refused", "rejected"),
    ("BDAT", "421"): ("451 4.3.2 going down", "451 4.3.2 going down", "unavailable"),
    **{
        ("BDAT", failure): (LOST, LOST, "unavailable")
        for failure in ("close", "reset", "silence", "garbage", "half a reply", "354")
    },
    ("chunk", "421"): ("250 2.0.0 chunk taken", "451 4.3.2 going down", "unavailable"),
    **{
        ("chunk", failure): ("250 2.0.0 chunk taken", LOST, "unavailable")
        for failure in ("4yz", "5yz", "close", "reset", "garbage", "half a reply", "354")
    },
    ("end_of_data", "4yz"): ("250 2.0.0 chunk taken", "450 4.7.9 not now", "deferred"),
    ("end_of_data", "5yz"): ("250 2.0.0 chunk taken", "550 5.7.9 never", "rejected"),
    ("end_of_data", "421"): ("250 2.0.0 chunk taken", "451 4.3.2 going down", "deferred"),
    **{
        ("end_of_data", failure): ("250 2.0.0 chunk taken", DOUBT, "in_doubt")
        for failure in ("close", "reset", "silence", "garbage", "half a reply", "354")
    },
}
# ... and when both chunks are up before the upstream says anything: the end of data is, too.
AT_ONCE = WAITS | {
    ("BDAT", "421"): ("451 4.3.2 going down", DOUBT, "in_doubt"),
    **{
        ("BDAT", failure): (DOUBT, DOUBT, "in_doubt")
        for failure in ("close", "reset", "silence", "garbage", "half a reply", "354")
    },
}


@pytest.mark.parametrize("at_once", [False, True], ids=["waits", "at_once"])
@pytest.mark.parametrize(("stage", "failure"), WAITS)
async def test_the_upstream_fails(
    stage: str, failure: str, at_once: bool, start: Any, upstream: ScriptedUpstream
) -> None:
    pipelining = "PIPELINING" in upstream.extensions
    silent = {"reply_timeout": "200ms", "end_of_data_timeout": "200ms"} if failure == "silence" else {}
    halfway = asyncio.Event()
    action = Delay(halfway, FAILURES[failure]) if stage != "chunk" else FAILURES[failure]
    if stage == "chunk":
        action = {" LAST": AfterOctets(20_000, action)}
    elif failure == "silence":
        action = FAILURES[failure]
    upstream.script = {stage: action}
    async with start(upstream.port, upstream=silent) as running, Client(running.port) as client:
        await begun(client)
        if stage == "chunk":
            first, second = await in_the_middle(client, running, at_once=at_once)
        elif at_once:
            await client.send(bdat(CHUNK) + bdat(LAST, last=True))
            if pipelining and stage == "BDAT":
                await eventually(lambda: running.relay.reception.services.settling)
            halfway.set()
            first, second = await client.replies(2)
        else:
            halfway.set()
            await client.send(bdat(CHUNK))
            first = await client.reply()
            await client.send(bdat(LAST, last=True))
            second = await client.reply()
        expected = (AT_ONCE if at_once and pipelining else WAITS)[stage, failure]
        if stage == "chunk" and at_once and str(first) == LOST:
            # What arrives in one piece with replies that answer nothing is not believed either.
            expected = (LOST, LOST, "unavailable")
        for reply, text in zip((first, second), expected, strict=False):
            assert str(reply).startswith(text) if text == DOUBT else str(reply) == text
        await counted(running, **{expected[2]: 1})
        assert running.rows() == []
        await next_message_passes(client, running, upstream)
        assert sum(outcomes(running).values()) == 2


async def in_the_middle(client: Client, running: Running, *, at_once: bool) -> list[Reply]:
    """Send two chunks, and the second half of the last one only after the upstream has failed."""
    last = bdat(LAST, last=True)
    half = len(last) - 10_000
    replies = []
    await client.send(bdat(CHUNK))
    if not at_once:
        replies.append(await client.reply())
    await client.send(last[:half])
    await eventually(lambda: "0 active" in repr(running.pool))
    await client.send(last[half:])
    return [*replies, *await client.replies(2 - len(replies))]


@pytest.mark.parametrize("stage", ["BDAT", "end_of_data"])
async def test_a_late_verdict_is_recorded(stage: str, start: Any, upstream: ScriptedUpstream) -> None:
    """Whether the chunk before the last one was answered or not: the client hears 451, the row is written."""
    answer = asyncio.Event()
    upstream.extensions.insert(0, "PIPELINING")  # else the last chunk waits for the reply before it
    upstream.script = {stage: [Delay(answer)]}
    async with start(upstream.port, upstream=LOOKS) as running, Client(running.port) as client:
        running.pool.end_of_data_timeout = 0.0
        await begun(client)
        await client.send(bdat(FIRST) + bdat(SECOND + THIRD, last=True))
        first, last = await client.replies(2)
        assert first.raw == last.raw if stage == "BDAT" else first.code == 250
        assert str(last).startswith(DOUBT)
        assert (running.rows(), outcomes(running)) == ([], {})
        client.reset()
        answer.set()
        await counted(running, accepted=1)
        (row,) = running.rows()
        assert json.loads(row["data"]) == {"relay": "relay.test", "client_reply": str(last)}
        await nothing_left(running)


# The client leaves.


@pytest.mark.parametrize("way", ["close", "reset", "half_close"])
@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (b"BDAT 20", "aborted"),
        (b"BDAT 20\r\n", "aborted"),
        (bdat(FIRST)[:-1], "aborted"),
        (bdat(FIRST), "aborted"),
        (bdat(FIRST) + b"BDAT 30000 LAST\r\n" + b"x" * 29_999, "aborted"),
        (bdat(FIRST) + bdat(SECOND + THIRD, last=True), "accepted"),
    ],
    ids=["in_the_command", "before_the_chunk", "in_the_chunk", "between", "before_the_last_octet", "verdict"],
)
async def test_the_client_leaves(
    said: bytes, outcome: str, way: str, start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": Delay(answer)}
    async with start(upstream.port) as running:
        async with Client(running.port) as client:
            await begun(client)
            await client.send(said)
            if said.startswith(bdat(FIRST)):
                await client.expect(250)
            if outcome == "accepted":
                await upstream.message()
            getattr(client, way)()
            if way != "close":
                answer.set()
            if way == "half_close":
                said_last = await client.expect_closed()
                assert said_last == (b"250 2.0.0 accepted as 1\r\n" if outcome == "accepted" else b"")
            answer.set()
            await counted(running, **{outcome: 1})
            await nothing_left(running)
        assert len(running.rows()) == len(upstream.messages) == (outcome == "accepted")
        async with Client(running.port) as client:
            await client.ehlo()
            await next_message_passes(client, running, upstream)


async def test_between_chunks_rset_clears_them_and_the_connection_is_kept(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(FIRST))
        await client.expect(250)
        await client.command("RSET", 250)
        await counted(running, aborted=1)
        await eventually(lambda: "1 idle" in repr(running.pool))
        assert upstream.connections[-1].lines[-1] == b"RSET"
        connections = len(upstream.connections)
        await next_message_passes(client, running, upstream)
        assert len(upstream.connections) == connections
        assert upstream.messages[0].chunks == [len(FIRST), len(SECOND + THIRD)]


async def test_the_first_chunk_that_was_refused_decides(start: Any, upstream: ScriptedUpstream) -> None:
    """What is said to those behind it only follows from that (RFC 3030 2)."""
    wrong = b"503 5.5.1 no transaction\r\n"
    upstream.script = {"BDAT": [b"452 4.3.1 no room\r\n", wrong], "end_of_data": [wrong]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        for chunk, code in ((FIRST, 452), (SECOND, 503), (THIRD, 503)):
            await client.send(bdat(chunk, last=chunk is THIRD))
            await client.expect(code)
        await counted(running, deferred=1)


async def test_behind_a_last_chunk_that_was_refused_rset_goes_up(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """What a server makes of its transaction then is not certain (RFC 3030 2)."""
    upstream.script = {"end_of_data": [b"452 4.3.1 no room\r\n"]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(CONTENT, last=True))
        await client.expect(452)
        await counted(running, deferred=1)
        await eventually(lambda: "1 idle" in repr(running.pool))
        assert upstream.connections[-1].lines[-1] == b"RSET"
        await next_message_passes(client, running, upstream)
        assert len(upstream.open_connections) == 1


async def test_a_connection_that_says_no_to_that_rset_is_not_kept(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"RSET": b"451 4.3.0 no\r\n"}
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(FIRST))
        await client.expect(250)
        await client.command("RSET", 250)
        await eventually(lambda: not upstream.open_connections)
        await next_message_passes(client, running, upstream)


# What the relay refuses.


async def test_a_message_without_an_octet(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        await client.send(b"BDAT 0 LAST\r\n")
        await client.expect(250)
        assert [(row["size"], row["task_type"]) for row in running.rows()] == [(0, "unclassified")]


async def test_a_chunk_that_makes_the_message_too_large(start: Any, upstream: ScriptedUpstream) -> None:
    limited = {"max_message_size": "1KiB"}
    async with start(upstream.port, server=limited) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(b"x" * 1000))
        await client.expect(250)
        for chunk in (bdat(b"RSET\r\n" * 5), bdat(b"", last=True)):
            await client.send(chunk)
            assert str(await client.reply()).startswith("552 5.3.4 ")
        await counted(running, refused=1)
        assert running.metric("client_rejects_total", reason="too_large") == 1
        await next_message_passes(client, running, upstream)


async def test_a_fault_answers_the_chunks_before_it_too(start: Any, upstream: ScriptedUpstream) -> None:
    """The connection is cut, so that their replies will not come."""
    upstream.extensions.insert(0, "PIPELINING")
    upstream.script = {"BDAT": Silence()}
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(FIRST) + bdat(b"a\nb") + bdat(b"RSET\r\n") + b"RSET\r\n")
        assert [str(reply)[:9] for reply in await client.replies(4)] == ["550 5.5.2"] * 3 + ["250 2.0.0"]
        await counted(running, refused=1)
        await eventually(lambda: not upstream.open_connections)
        assert running.metric("client_rejects_total", reason="stray_newline") == 1
        assert upstream.messages == []


async def test_one_that_is_far_too_large_ends_the_session(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, server={"max_message_size": 0}) as running:
        upstream.extensions = [word for word in upstream.extensions if not word.startswith("SIZE")]
        for size in (b"4294967301", b"99999999999999999999"):
            async with Client(running.port) as client:
                await begun(client)
                await client.send(b"BDAT %b LAST\r\n" % size + b"x" * 5 + MAIL)
                assert str(await client.reply()).startswith("552 5.3.4 ")
                await client.expect_closed()
        await counted(running, refused=2)
        await nothing_left(running)
        assert upstream.messages == []


async def test_one_that_belongs_to_no_message_has_the_same_bound(
    start: Any, upstream: ScriptedUpstream
) -> None:
    server = {"max_message_size": "1KiB"}
    async with start(upstream.port, server=server) as running, Client(running.port) as client:
        await client.ehlo()
        await client.send(b"BDAT 100000000 LAST\r\nxxxxx")
        assert str(await client.reply()).startswith("552 5.3.4 ")
        await client.expect_closed()


async def test_empty_chunks_without_end_finish_the_session(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        client.send_unread(b"BDAT 0\r\n" * 1000)
        said = await client.expect_closed()
        assert said.count(b"250 ") == dialogue_module.MAX_IDLE_COMMANDS
        assert b"421 4.7.0 Too many commands" in said
        await nothing_left(running)


async def test_chunks_that_come_too_slowly(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate is that of the message, also between chunks; the upstream's time is not the client's."""
    grace = content_module.DATA_RATE_GRACE
    server = {"min_data_rate": "500B", "lease_idle_timeout": "1h", "idle_timeout": "2h"}
    for rest in (b"", b"BDAT 1000\r\nx"):
        async with start(upstream.port, server=server) as running, Client(running.port) as client:
            await begun(client)
            await client.send(bdat(FIRST))
            await client.expect(250)
            await client.send(rest)
            (session,) = running.relay.reception._sessions
            if rest:
                await eventually(lambda s=session: s._dialogue._state is dialogue_module.CHUNK)
            now = asyncio.get_running_loop().time()
            running.relay.reception.sweep(now + grace - 1, 0.0)
            running.relay.reception.sweep(now + grace + 1, 0.0)
            assert str(await client.reply()) == "421 4.4.2 The message comes too slowly; closing"
            assert running.metric("client_rejects_total", reason="slow") == 1
            await client.expect_eof()
            await nothing_left(running)


async def test_another_chunk_does_not_begin_the_time_of_the_message_anew(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(FIRST))
        await client.expect(250)
        (session,) = running.relay.reception._sessions
        session._dialogue._content._began -= content_module.DATA_RATE_GRACE  # as if it had been sent then
        await client.send(bdat(SECOND))
        await client.expect(250)
        running.relay.reception.sweep(asyncio.get_running_loop().time() + 1, 0.0)
        assert str(await client.reply()) == "421 4.4.2 The message comes too slowly; closing"
        await client.expect_eof()


async def test_a_client_silent_between_chunks_loses_the_connection(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, server={"min_data_rate": 0}) as running, Client(running.port) as client:
        await begun(client)
        await client.send(bdat(FIRST))
        await client.expect(250)
        running.relay.reception.sweep(asyncio.get_running_loop().time() + 31, 0.0)
        await eventually(lambda: "1 idle" in repr(running.pool))
        await client.send(bdat(SECOND) + bdat(THIRD, last=True))
        for reply in await client.replies(2):
            assert str(reply).startswith("451 4.4.2 Silent for too long: ")
        await counted(running, aborted=1)
        await next_message_passes(client, running, upstream)


async def test_an_upstream_that_does_not_read_holds_the_client(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"chunk": StopReading()}
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        size = 20_000_000
        client.send_unread(b"BDAT %d LAST\r\n" % size + b"x" * size)
        await eventually(lambda: any(s._dialogue._holding for s in running.relay.reception._sessions))
        upstream.connections[-1].wire.resume()
        await client.expect(250)
        assert upstream.messages[0].size == size


async def test_an_upstream_that_has_no_chunking_any_more(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        upstream.extensions = ["PIPELINING"]
        for connection in upstream.open_connections:
            connection.close()
        await eventually(lambda: " 0 idle" in repr(running.pool))
        for command in (MAIL, RCPT):
            await client.send(command)
            await client.expect(250)
        await client.send(bdat(FIRST) + bdat(b"", last=True))
        for reply in await client.replies(2):
            assert str(reply).startswith("451 4.3.3 The upstream server does not take BDAT now")
        await counted(running, unavailable=1)
        assert upstream.messages == []
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
        assert "CHUNKING" not in str(await client.ehlo())


async def test_one_that_has_it_on_one_connection_alone(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await begun(client)
        extensions, upstream.extensions = upstream.extensions, ["PIPELINING"]
        async with Client(running.port) as other:
            await begun(other)
        assert "CHUNKING" not in running.pool.capabilities
        upstream.extensions = extensions  # what it offered to the first one
        await client.send(bdat(FIRST))
        await client.expect(250)
        await client.send(bdat(SECOND + THIRD, last=True))
        await client.expect(250)
        assert [message.content for message in upstream.messages] == [CONTENT]


# AUTH= (RFC 4954 5) and SIZE= (RFC 1870) on MAIL


@pytest.mark.parametrize(
    ("line", "without"),
    [
        (b"MAIL FROM:<a@b.test> AUTH=<>", b"MAIL FROM:<a@b.test>"),
        (
            b"MAIL FROM:<a@b.test>  BODY=8BITMIME  auth=c+2Bd@b.test SIZE=9",
            b"MAIL FROM:<a@b.test>  BODY=8BITMIME SIZE=9",
        ),
        (
            b'MAIL FROM:<" AUTH=x "@b.test> AUTH=<>  ENVID=AUTH=x',
            b'MAIL FROM:<" AUTH=x "@b.test>  ENVID=AUTH=x',
        ),
        (b"MAIL FROM:<a@b.test> XAUTH=<>", b"MAIL FROM:<a@b.test> XAUTH=<>"),
        (b"MAIL FROM:<a@b.test> AUTH", b"MAIL FROM:<a@b.test> AUTH"),
    ],
)
async def test_the_auth_parameter_is_for_an_upstream_with_auth(
    line: bytes, without: bytes, start: Any, upstream: ScriptedUpstream
) -> None:
    for offers in (False, True):
        if offers:
            upstream.extensions = [*upstream.extensions, "AUTH PLAIN"]
        async with start(upstream.port) as running, Client(running.port) as client:
            await client.ehlo()
            await client.command(line, 250)
        assert upstream.incomplete[-1].mail == (line if offers else without)


async def test_the_size_parameter_is_for_an_upstream_with_size(
    start: Any, upstream: ScriptedUpstream
) -> None:
    def strict(stage: str, line: bytes, connection: Connection) -> bytes | None:
        return b"555 5.5.4 not offered here\r\n" if b"size=" in line.lower() else None

    upstream.script = {"MAIL": strict}
    upstream.extensions = [word for word in upstream.extensions if not word.startswith("SIZE")]

    def send(port: int) -> dict[str, tuple[int, bytes]]:
        with smtplib.SMTP("127.0.0.1", port, timeout=10) as smtp:
            smtp.ehlo()
            assert smtp.has_extn("size")  # so it says it
            return smtp.sendmail("a@example.test", ["b@example.test"], CONTENT)

    async with start(upstream.port) as running:
        assert await asyncio.to_thread(send, running.port) == {}
        assert [message.mail for message in upstream.messages] == [MAIL.strip()]


# All of a message at once: its only chunk goes up with MAIL and RCPT, before anything is answered.

OTHER = b"RCPT TO:<no@example.test>\r\n"
AHEAD = MAIL + RCPT + OTHER + bdat(CONTENT, last=True)
REFUSED, MAIL_REFUSED = b"550 5.1.1 no such user\r\n", b"550 5.7.1 not from here\r\n"
NOBODY, NO_MAIL = "554 5.5.1 no valid recipients", "503 5.5.1 MAIL first"


@pytest.fixture
async def pipelining() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(extensions=[*EXTENSIONS, *CHUNKING]) as server:
        yield server
        assert server.violations == []


def gated(action: Any = None) -> tuple[asyncio.Event, Delay]:
    """Return what holds a reply back, and the reply."""
    gate = asyncio.Event()
    return gate, Delay(gate, action)


async def ahead(client: Client, running: Running, gate: asyncio.Event, wire: bytes = AHEAD) -> list[str]:
    """Send a message in one go; the upstream answers once all of it, the end of data too, has gone up."""
    await client.send(wire)
    await eventually(lambda: running.relay.reception.services.settling)
    assert running.relay.records.journal.in_use == 1
    gate.set()
    return [str(reply) for reply in await client.replies(wire.count(b"RCPT TO:<") + 2)]


@pytest.mark.parametrize(
    ("script", "told", "outcome"),
    [
        ({"RCPT": REFUSED}, ["250 2.1.0 ok", "550 5.1.1 no such user", NOBODY], "rejected"),
        ({"RCPT": b"450 4.2.0 later\r\n"}, ["250 2.1.0 ok", "450 4.2.0 later", NOBODY], "deferred"),
        ({"MAIL": MAIL_REFUSED}, ["550 5.7.1 not from here", NO_MAIL, NO_MAIL], "rejected"),
        (
            {"RCPT": REFUSED, "end_of_data": b"250 2.0.0 sent to nobody\r\n"},
            ["250 2.1.0 ok", "550 5.1.1 no such user", "554 5.5.1 No valid recipients"],
            "rejected",
        ),
        (
            {"RCPT": REFUSED, "end_of_data": Close()},
            ["250 2.1.0 ok", "550 5.1.1 no such user", "554 5.5.1 No valid recipients"],
            "rejected",
        ),
        (
            {"RCPT": REFUSED, "end_of_data": Silence()},
            ["250 2.1.0 ok", "550 5.1.1 no such user", "554 5.5.1 No valid recipients"],
            "rejected",
        ),
    ],
    ids=["rejected", "deferred", "MAIL", "accepted all the same", "lost", "silent"],
)
async def test_ahead_with_nobody_to_send_to(
    script: dict[str, Any], told: list[str], outcome: str, start: Any, pipelining: ScriptedUpstream
) -> None:
    """Each reply as it came; neither a row nor a doubt, whatever the upstream says to the chunk."""
    gate, held = gated(script.get("MAIL"))
    pipelining.script = script | {"MAIL": held}
    short = {"end_of_data_timeout": "200ms"} if script.get("end_of_data") == Silence() else {}
    async with start(pipelining.port, upstream=short) as running, Client(running.port) as client:
        await client.ehlo()
        wire = MAIL + RCPT + bdat(CONTENT, last=True)
        assert await ahead(client, running, gate, wire) == told
        await counted(running, **{outcome: 1})
        assert running.rows() == running.rows("SELECT * FROM task_in_doubt") == []
        assert running.relay.records.journal.in_use == 0
        connections = len(pipelining.connections)
        trusted = not {"end_of_data", "MAIL"} & script.keys()  # behind a refused MAIL, all is out of sequence
        await eventually(lambda: f"{int(trusted)} idle" in repr(running.pool))
        await next_message_passes(client, running, pipelining)
        assert len(pipelining.connections) == connections + (not trusted)


async def test_ahead_partly_refused(start: Any, pipelining: ScriptedUpstream) -> None:
    gate, held = gated()
    pipelining.script = {"MAIL": held, "RCPT": {"no@": REFUSED}}
    async with start(pipelining.port) as running, Client(running.port) as client:
        await client.ehlo()
        told = await ahead(client, running, gate)
        assert told == ["250 2.1.0 ok", "250 2.1.5 ok", "550 5.1.1 no such user", "250 2.0.0 accepted as 1"]
        await recorded(running, pipelining)
        (row,) = running.rows()
        assert json.loads(row["data"])["refused"] == [
            {"recipient": "no@example.test", "reply": "550 5.1.1 no such user"}
        ]
        rows = running.rows("SELECT recipient FROM task_done_recipient")
        assert [each["recipient"] for each in rows] == ["b@example.test"]
        await client.quit()
        await nothing_left(running)


@pytest.mark.parametrize(
    "failure", [Close(), Reset(), Garbage(), HalfReply(), Silence()], ids=lambda each: type(each).__name__
)
@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "end_of_data"])
async def test_ahead_and_no_verdict(
    stage: str, failure: Any, start: Any, pipelining: ScriptedUpstream
) -> None:
    """The end of data is up: in doubt, with whoever was not refused; it is not sent again."""
    gate, held = gated(failure if stage == "MAIL" else None)
    script: dict[str, Any] = {"RCPT": {"no@": REFUSED}, "MAIL": held}
    if stage != "MAIL":
        script[stage] = {"b@": failure, "no@": REFUSED} if stage == "RCPT" else failure
    pipelining.script = script
    short = {"reply_timeout": "200ms", "end_of_data_timeout": "200ms"} if failure == Silence() else {}
    async with start(pipelining.port, upstream=short) as running, Client(running.port) as client:
        await client.ehlo()
        told = await ahead(client, running, gate)
        known = {"MAIL": [], "RCPT": ["250 2.1.0 ok"]}.get(
            stage, ["250 2.1.0 ok", "250 2.1.5 ok", "550 5.1.1 no such user"]
        )
        assert told[: len(known)] == known
        assert all(each.startswith(DOUBT) for each in told[len(known) :])
        await counted(running, in_doubt=1)
        assert running.rows() == []
        (doubt,) = running.rows("SELECT * FROM task_in_doubt")
        unrefused = ["b@example.test"] + ([] if stage == "end_of_data" else ["no@example.test"])
        assert json.loads(doubt["recipients"]) == unrefused
        await client.quit()
        assert sum(len(each.messages) for each in pipelining.connections) == (stage != "MAIL")
        await nothing_left(running)


@pytest.mark.parametrize(
    ("stage", "told", "outcome", "doubtful"),
    [
        ("MAIL", ["451 4.3.2 going down"] * 4, "unavailable", []),
        ("RCPT", ["250 2.1.0 ok", "451 4.3.2 going down", DOUBT, DOUBT], "in_doubt", ["no@example.test"]),
    ],
)
async def test_ahead_and_421(
    stage: str, told: list[str], outcome: str, doubtful: list[str], start: Any, pipelining: ScriptedUpstream
) -> None:
    """Without MAIL the upstream has no transaction, so there is no doubt."""
    closes = Close(b"421 4.3.2 going down\r\n")
    gate, held = gated(closes if stage == "MAIL" else None)
    pipelining.script = {"RCPT": closes} | {"MAIL": held}
    async with start(pipelining.port) as running, Client(running.port) as client:
        await client.ehlo()
        heard = await ahead(client, running, gate)
        assert [each[: len(text)] for each, text in zip(heard, told, strict=True)] == told
        await counted(running, **{outcome: 1})
        doubts = running.rows("SELECT * FROM task_in_doubt")
        assert [json.loads(each["recipients"]) for each in doubts] == ([doubtful] if doubtful else [])
        assert running.rows() == []
        assert running.relay.records.journal.in_use == 0
        await next_message_passes(client, running, pipelining)


async def test_ahead_and_a_late_verdict(start: Any, pipelining: ScriptedUpstream) -> None:
    """The client hears a reply to each command; the row has who was accepted after all."""
    gate, held = gated()
    pipelining.script = {"MAIL": held, "RCPT": {"no@": REFUSED}}
    async with start(pipelining.port, upstream=LOOKS) as running, Client(running.port) as client:
        running.pool.end_of_data_timeout = 0.0
        await client.ehlo()
        await client.send(AHEAD)
        assert all(str(each).startswith(DOUBT) for each in await client.replies(4))
        await eventually(lambda: running.rows("SELECT * FROM task_in_doubt"))
        gate.set()
        await counted(running, accepted=1)
        rows = running.rows("SELECT recipient FROM task_done_recipient")
        assert [each["recipient"] for each in rows] == ["b@example.test"]
        assert running.rows("SELECT * FROM task_in_doubt") == []


@pytest.mark.parametrize("missing", [0, 1], ids=["idle for long", "not all of it is here"])
async def test_what_could_not_be_replaced_waits(
    missing: int, start: Any, pipelining: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that has died unnoticed is replaced unseen as long as nothing of the content is up."""
    if not missing:
        monkeypatch.setattr(transaction_module, "PROVEN", -1.0)
    pipelining.script = {"MAIL": [Close()]}
    async with start(pipelining.port) as running, Client(running.port) as client:
        await client.ehlo()
        await eventually(lambda: "1 idle" in repr(running.pool))
        await client.send(AHEAD[: len(AHEAD) - missing])
        told = [each.code for each in await client.replies(3 if missing else 4)]
        await client.send(AHEAD[len(AHEAD) - missing :])
        if missing:
            told.append((await client.reply()).code)
        assert told == [250] * 4
        await recorded(running, pipelining)
        assert len(pipelining.connections) == 2


LOOP = b"Received: x\r\n" * (transaction_module.MAX_RECEIVED + 1) + b"\r\n"


@pytest.mark.parametrize(
    ("content", "reply"), [(b"a\nb", "550 5.5.2"), (LOOP, "554 5.4.6")], ids=["stray newline", "loop"]
)
async def test_a_message_at_fault_does_not_go_ahead(
    content: bytes, reply: str, start: Any, pipelining: ScriptedUpstream
) -> None:
    """What the relay has to say against it would answer MAIL and RCPT too."""
    async with start(pipelining.port) as running, Client(running.port) as client:
        await eventually(lambda: "1 idle" in repr(running.pool))
        await client.ehlo()
        await client.send(MAIL + RCPT + bdat(content, last=True))
        told = [str(each) for each in await client.replies(3)]
        assert told[:2] == ["250 2.1.0 ok", "250 2.1.5 ok"]
        assert told[2].startswith(reply)
        await counted(running, refused=1)
        assert pipelining.messages == []


@pytest.mark.parametrize(
    ("recipients", "over"),
    [
        (transaction_module.MAX_AHEAD + 1, {}),
        (1, {"limits": [{"scope": "recipient_domain", "max": 100, "per": "1d"}]}),
        (1, {"upstream": {"match": {"recipient_domain": ["example.test"]}}}),
    ],
    ids=["too many to keep a place for", "counted by who is accepted", "MAIL was answered by the relay"],
)
async def test_the_chunk_waits_for_the_replies(
    recipients: int, over: dict[str, Any], start: Any, pipelining: ScriptedUpstream
) -> None:
    gate, held = gated()
    pipelining.script = {"RCPT": {f"r{recipients - 1}@": held}}
    rcpt = b"".join(b"RCPT TO:<r%d@example.test>\r\n" % number for number in range(recipients))
    async with start(pipelining.port, **over) as running, Client(running.port) as client:
        await eventually(lambda: "1 idle" in repr(running.pool))
        await client.ehlo()
        await client.send(MAIL + rcpt + bdat(CONTENT, last=True))
        await eventually(lambda: len(pipelining.log) == 2 + recipients)  # EHLO, MAIL and all RCPT are up
        assert running.relay.reception.services.settling == set()
        gate.set()
        assert {each.code for each in await client.replies(recipients + 2)} == {250}
        await recorded(running, pipelining)
