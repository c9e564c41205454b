"""Rate limits in the whole relay: what passes, what the client hears and when, what goes upstream."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
import sqlite3
from collections import Counter
from typing import Any

import pytest

from relay import maillog
from relay.limits import limits as limits_module
from relay.records.counts import StoredCounts
from relay.records.errors import StoreError
from relay.records.sqlite.store import SqliteStore
from relay.reload import reload
from tests.support.client import Client
from tests.support.codes import OTHER, send, send_on
from tests.support.upstream import CHUNKING, EXTENSIONS, Close, Command, Delay, ScriptedUpstream, StopReading
from tests.support.watch import eventually, outcomes

MENTION = b"From: a@example.com\r\nX-Task-Type: mention\r\n\r\ntext\r\n"
MAIL = b"MAIL FROM:<a@example.com>"
MENTIONS = {"name": "mentions", "scope": "sender", "task_type": "mention", "max": 100, "per": "1d"}


def limit(**keys: Any) -> dict[str, Any]:
    given = {"scope": "sender", "max": 2, "per": "1d", **keys}
    return {key: value for key, value in given.items() if value is not None}


def verbs(upstream: ScriptedUpstream) -> list[str]:
    """Return the commands that came, in their order."""
    return [each.line.split()[0].decode().upper() for each in upstream.log if isinstance(each, Command)]


async def test_the_sender_is_refused_at_mail_and_nothing_goes_upstream(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, limits=[limit()]) as running:
        assert (await send(running.port, "A@Example.COM", ["b@example.org"]))[-1] == 250
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
        seen = len(verbs(upstream))
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            reply = await client.command("MAIL FROM:<a@EXAMPLE.com>")
            assert str(reply).startswith(
                "451 4.7.1 Rate limit sender-1d (2 messages in 1d) is reached, try again in "
            )
            assert re.search(r"try again in (1d|23h[0-9]+m|24h)$", str(reply).strip())
            assert (await send_on(client, "other@example.com", ["b@example.org"]))[-1] == 250
            assert (await send_on(client, "", ["b@example.org"]))[-1] == 250
        assert len(upstream.messages) == 4
        assert verbs(upstream)[seen:].count("MAIL") == 2
        assert running.metric("limit_hits_total", limit="sender-1d", action="defer") == 1
        assert running.metric("messages_total", upstream="none", outcome="refused") == 1
        assert running.metric("client_rejects_total", reason="limit") == 1


async def test_the_log_says_what_the_client_heard_to_its_mail(start: Any, upstream: ScriptedUpstream) -> None:
    stream = io.BytesIO()
    async with start(upstream.port, limits=[limit(max=1)]) as running:
        maillog.configure("json", "info", stream)
        try:
            async with Client(running.port) as client:
                await client.greeting()
                await client.ehlo()
                await send_on(client, "a@example.com", ["b@example.org"])
                heard = await client.command("MAIL FROM:<a@example.com>", 451)
            maillog.flush()
        finally:
            maillog.configure("json", "info")
    (line,) = [
        each for each in map(json.loads, stream.getvalue().splitlines()) if each.get("outcome") == "refused"
    ]
    assert line["client_reply"] == str(heard)


async def test_commands_behind_a_refused_mail_get_their_replies(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, limits=[limit(max=1, action="reject")]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            # Nothing is known yet: the store is asked while the commands behind have come already.
            group = (
                b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nRCPT TO:<c@example.org>\r\nDATA\r\n"
            )
            await client.send(group)
            assert [each.code for each in await client.replies(4)] == [250, 250, 250, 354]
            await client.send(OTHER + b".\r\n")
            await client.expect(250)
            await client.send(group)
            replies = await client.replies(4)
            assert str(replies[0]).startswith("550 5.7.1 Rate limit sender-1d (1 messages in 1d) is reached")
            assert [each.code for each in replies] == [550, 503, 503, 503]
            await client.command("NOOP", 250)
        assert len(upstream.messages) == 1


@pytest.mark.parametrize("by_type", [False, True])
@pytest.mark.parametrize("way", ["refused", "lost"])
async def test_commands_that_wait_for_the_store_get_their_replies_when_mail_is_refused(
    way: str, by_type: bool, start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream answers MAIL while the relay still asks whether the recipient may be sent to."""
    answer, look_up = asyncio.Event(), StoredCounts.look_up

    async def slowly(self: StoredCounts, *asked: Any) -> Any:
        await answer.wait()
        return await look_up(self, *asked)

    monkeypatch.setattr(StoredCounts, "look_up", slowly)
    monkeypatch.setattr(limits_module, "ASK_TIMEOUT_S", 3600.0)
    upstream.script = {"MAIL": b"550 5.1.0 not you\r\n" if way == "refused" else Close()}
    limits = [limit(scope="recipient"), *([MENTIONS] if by_type else [])]
    async with start(upstream.port, limits=limits) as running, Client(running.port) as client:
        await client.ehlo()
        group = (MAIL, b"RCPT TO:<b@example.org>", b"RCPT TO:<c@example.org>", b"DATA")
        await client.send(b"".join(line + b"\r\n" for line in group))
        codes = [reply.code for reply in await client.replies(4)]
        assert codes == ([550, 503, 503, 503] if way == "refused" else [451] * 4)
        await client.command("NOOP", 250)
        upstream.script = {}
        answer.set()
        assert (await send_on(client, "a@example.com", ["b@example.org", "c@example.org"]))[-1] == 250
        assert outcomes(running) == {"accepted": 1, ("rejected" if way == "refused" else "unavailable"): 1}


class AnswersUnread(asyncio.Protocol):
    """An upstream that reads nothing behind MAIL, and answers what it is told that there is."""

    def __init__(self) -> None:
        self._lines = b""
        self._content = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"220 upstream.test ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._lines = (self._lines + data).split(b"\r\n")
        for line in lines:
            if self._content:
                if line == b".":
                    self._content = False
                    self.transport.write(b"250 2.0.0 accepted\r\n")
            elif line.startswith(b"EHLO"):
                self.transport.write(b"250-upstream.test\r\n250 PIPELINING\r\n")
            elif line.startswith(b"MAIL"):
                self.transport.pause_reading()
            elif line == b"DATA":
                self._content = True
                self.transport.write(b"354 go ahead\r\n")


async def test_an_upstream_that_answers_what_it_has_not_read_holds_up_nobody(start: Any) -> None:
    """What it does not take of the commands is no reason not to read the header section, which decides."""
    group = [MAIL, *[b"RCPT TO:<b@example.org> ORCPT=rfc822;" + b"x" * 900] * 40]
    upstream = AnswersUnread()
    server = await asyncio.get_running_loop().create_server(lambda: upstream, "127.0.0.1", 0)
    server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    port = server.sockets[0].getsockname()[1]
    async with start(port, limits=[MENTIONS]) as running, Client(running.port) as client:
        await client.ehlo()
        (connection,) = running.pool._open
        wire = connection._transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await client.send(b"".join(line + b"\r\n" for line in (*group, b"DATA")))
        await eventually(lambda: len(connection._awaited) == len(group))
        upstream.transport.write(b"250 2.0.0 ok\r\n" * len(group))
        assert {reply.code for reply in await client.replies(len(group))} == {250}
        assert connection._paused_since is not None
        await client.expect(354)
        await client.send(MENTION + b".\r\n")
        upstream.transport.resume_reading()
        await client.expect(250)
        assert len(running.rows()) == 1
    server.close()


async def test_recipients_behind_a_refused_mail_are_refused_too(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, limits=[limit(max=None, max_bytes="1KiB")]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            # They come while the store is asked.
            await client.send(
                b"MAIL FROM:<a@example.com> SIZE=2000\r\nRCPT TO:<b@x.example>\r\nRCPT TO:<c@x.example>\r\n"
            )
            assert [each.code for each in await client.replies(3)] == [550, 503, 503]
        assert running.metric("recipients_total", upstream="none", outcome="refused") == 2
        assert running.metric("recipients_total", upstream="none", outcome="rejected") == 0


async def test_each_recipient_gets_its_own_reply(start: Any, upstream: ScriptedUpstream) -> None:
    limits = [
        limit(scope="recipient", max=1),
        limit(scope="recipient_domain", max_recipients=3, max=None, name="domains"),
    ]
    async with start(upstream.port, limits=limits) as running:
        codes = await send(running.port, "a@example.com", ["b@example.org", "c@example.org", "d@example.net"])
        assert codes == [250, 250, 250, 250, 354, 250]
        codes = await send(
            running.port,
            "a@example.com",
            ["B@example.org", "e@EXAMPLE.org", "f@example.org", "d@example.net", "g@example.net"],
        )
        assert codes == [250, 451, 250, 451, 451, 250, 354, 250]
        assert [len(message.rcpts) for message in upstream.messages] == [3, 2]
        row = running.rows()[-1]
        assert "Rate limit domains" in row["data"]
        assert "Rate limit recipient-1d" in row["data"]
        # By the relay's own policy, and not by the upstream.
        assert running.metric("recipients_total", upstream="primary", outcome="refused") == 3
        assert running.metric("recipients_total", upstream="primary", outcome="deferred") == 0


async def test_a_recipient_that_the_upstream_refuses_does_not_count(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"RCPT": {"bad@": b"550 5.1.1 no\r\n"}}
    async with start(upstream.port, limits=[limit(max=None, max_recipients=2)]) as running:
        codes = await send(
            running.port,
            "a@example.com",
            ["bad@example.org", "b@example.org", "c@example.org", "d@example.org"],
        )
        assert codes == [250, 550, 250, 250, 451, 354, 250]
        assert (await send(running.port, "a@example.com", ["b@example.org"])) == [451]


async def test_only_what_was_accepted_counts(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {
        "MAIL": [b"451 4.3.0 later\r\n", None],
        "end_of_data": [b"550 5.7.1 spam\r\n", b"451 4.3.0 later\r\n", None],
    }
    async with start(upstream.port, limits=[limit(max=1)]) as running:
        last = [(await send(running.port, "a@example.com", ["b@example.org"]))[-1] for _ in range(5)]
        assert last == [451, 550, 451, 250, 451]
        assert running.metric("limit_hits_total", limit="sender-1d", action="defer") == 1
        assert len(running.rows()) == 1


async def test_a_message_in_doubt_counts(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"end_of_data": [Close(), None]}
    async with start(upstream.port, limits=[limit(max=1)]) as running:
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451
        assert await send(running.port, "a@example.com", ["b@example.org"]) == [451]
    async with start(upstream.port, limits=[limit(max=1)]) as running:
        assert await send(running.port, "a@example.com", ["b@example.org"]) == [451]


async def test_no_more_than_100_mentions_by_one_sender_in_a_day(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """The rule that the table was made for, as the documentation has it."""
    async with start(upstream.port, limits=[MENTIONS]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            for _ in range(100):
                assert (await send_on(client, "a@example.com", ["b@example.org"], MENTION))[-1] == 250
            assert await send_on(client, "A@example.com", ["b@example.org"], MENTION) == [250, 250, 354, 451]
            # Neither other mail of the sender nor mentions by others are held.
            assert (await send_on(client, "a@example.com", ["b@example.org"], OTHER))[-1] == 250
            assert (await send_on(client, "c@example.com", ["b@example.org"], MENTION))[-1] == 250
        assert len(upstream.messages) == 102
        assert running.metric("messages_total", upstream="none", outcome="refused") == 1
    # The count is in the table: a restart changes nothing.
    async with start(upstream.port, limits=[MENTIONS]) as running:
        assert (await send(running.port, "a@example.com", ["b@example.org"], MENTION))[-1] == 451
        assert (await send(running.port, "a@example.com", ["b@example.org"], OTHER))[-1] == 250


async def test_a_refused_message_is_read_to_its_end(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, limits=[MENTIONS | {"max": 1, "action": "reject"}]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            assert (await send_on(client, "a@example.com", ["b@example.org"], MENTION))[-1] == 250
            large = MENTION + b"MAIL FROM:<x@example.com>\r\n..\r\n" * 20_000
            assert (await send_on(client, "a@example.com", ["b@example.org"], large))[-1] == 550
            await client.command("NOOP", 250)
        (message,) = upstream.messages
        assert message.content == MENTION
        assert [verb for verb in verbs(upstream) if verb in ("DATA", "RSET")] == ["DATA", "RSET"]


async def test_content_that_was_held_arrives_octet_for_octet(start: Any, upstream: ScriptedUpstream) -> None:
    content = MENTION + b"..dot\r\n" + bytes(range(32, 127)) * 5 + b"\r\n" + b"line\r\n" * 50_000
    async with start(upstream.port, limits=[MENTIONS]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            await client.command("MAIL FROM:<a@example.com>", 250)
            await client.command("RCPT TO:<b@example.org>", 250)
            await client.command("DATA", 354)
            for start_at in (0, 1, 7, 30, 60, 61):
                await client.send(
                    content[start_at : {0: 1, 1: 7, 7: 30, 30: 60, 60: 61, 61: 10**9}[start_at]]
                )
                await asyncio.sleep(0.01)
            await client.send(b".\r\n")
            await client.expect(250)
        assert upstream.accepted[0].wire == content


async def test_behind_what_was_held_no_more_is_read_than_the_upstream_takes(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"body": StopReading()}
    async with start(upstream.port, limits=[MENTIONS]) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        await client.command("MAIL FROM:<a@example.com>", 250)
        await client.command("RCPT TO:<b@example.org>", 250)
        (connection,) = running.pool._open
        transport: Any = connection._transport
        # As over a network: the kernel takes less at once than is held.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        await client.command("DATA", 354)
        sending = asyncio.create_task(client.send(MENTION + (b"x" * 998 + b"\r\n") * 20_000))
        await upstream.wait_for(lambda: upstream.incomplete and upstream.incomplete[0].mail)
        waits = [0, 1]
        while (not waits[-1] or waits[-1] != waits[-2]) and len(waits) < 100:
            await asyncio.sleep(0.1)
            waits.append(transport.get_write_buffer_size())
        sending.cancel()
        assert 0 < waits[-1] < 1024 * 1024


async def test_what_the_upstream_says_to_data_is_heard_at_the_end(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"DATA": [b"451 4.3.2 not now\r\n", b"554 5.0.0 never\r\n", None]}
    async with start(upstream.port, limits=[MENTIONS]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            assert await send_on(client, "a@example.com", ["b@example.org"], MENTION) == [250, 250, 354, 451]
            assert await send_on(client, "a@example.com", ["b@example.org"], MENTION) == [250, 250, 354, 554]
            assert await send_on(client, "a@example.com", ["b@example.org"], MENTION) == [250, 250, 354, 250]
        assert len(upstream.connections) == 1
        assert running.metric("messages_total", upstream="primary", outcome="deferred") == 1
        assert running.metric("messages_total", upstream="primary", outcome="rejected") == 1


async def test_data_without_a_recipient_is_answered_before_any_content(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"RCPT": {"bad@": b"550 5.1.1 no\r\n"}, "MAIL": {"bad@": b"550 5.1.0 no\r\n"}}
    async with start(upstream.port, limits=[MENTIONS]) as running, Client(running.port) as client:
        await client.greeting()
        await client.ehlo()
        assert await send_on(client, "a@example.com", ["bad@example.org"], MENTION) == [250, 550, 554]
        await client.send(b"MAIL FROM:<bad@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        assert [each.code for each in await client.replies(3)] == [550, 503, 503]
        assert (await send_on(client, "a@example.com", ["b@example.org"], MENTION))[-1] == 250


async def test_chunking_is_not_offered_where_the_header_section_decides(start: Any) -> None:
    async with ScriptedUpstream(extensions=(*EXTENSIONS, *CHUNKING)) as upstream:
        for limits, offered in (
            ([MENTIONS], False),
            ([MENTIONS | {"action": "observe"}], True),
            ([limit()], True),
        ):
            async with start(upstream.port, limits=limits) as running, Client(running.port) as client:
                await client.greeting()
                assert ("CHUNKING" in str(await client.ehlo())) is offered


async def test_chunks_that_were_offered_before_there_was_such_a_limit(start: Any, settings_for: Any) -> None:
    async with (
        ScriptedUpstream(extensions=(*EXTENSIONS, *CHUNKING)) as upstream,
        start(upstream.port) as running,
        Client(running.port) as client,
    ):
        await client.greeting()
        assert "CHUNKING" in str(await client.ehlo())
        await reload(running.relay, lambda: settings_for(upstream.port, limits=[MENTIONS]))
        await client.command("MAIL FROM:<a@example.com>", 250)
        await client.command("RCPT TO:<b@example.org>", 250)
        await client.send(b"BDAT %d LAST\r\n" % len(MENTION) + MENTION)
        assert (await client.expect(451)).text.startswith("4.3.3 ")
        assert upstream.messages == []
        assert (await send_on(client, "a@example.com", ["b@example.org"], MENTION))[-1] == 250


async def test_limits_count_chunks_too(start: Any) -> None:
    async with ScriptedUpstream(extensions=(*EXTENSIONS, *CHUNKING)) as upstream:
        limits = [MENTIONS | {"action": "observe", "max": 1}, limit(max=2)]
        async with start(upstream.port, limits=limits) as running:
            async with Client(running.port) as client:
                await client.greeting()
                await client.ehlo()
                for _ in range(2):
                    await client.command("MAIL FROM:<a@example.com>", 250)
                    await client.command("RCPT TO:<b@example.org>", 250)
                    await client.send(b"BDAT %d LAST\r\n" % len(MENTION) + MENTION)
                    await client.expect(250)
                await client.command("MAIL FROM:<a@example.com>", 451)
            assert running.metric("limit_hits_total", limit="mentions", action="observe") == 1


async def test_octets_count_as_they_are_and_a_message_that_is_too_much_is_refused(
    start: Any, upstream: ScriptedUpstream
) -> None:
    octets = {"scope": "client", "max_bytes": 1000, "per": "1h"}
    async with start(upstream.port, limits=[octets]) as running:
        async with Client(running.port) as client:
            await client.greeting()
            await client.ehlo()
            body = b"x" * 398 + b"\r\n"
            assert (await send_on(client, "a@example.com", ["b@example.org"], body))[-1] == 250
            assert (await send_on(client, "a@example.com", ["b@example.org"], body))[-1] == 250
            assert await send_on(client, "a@example.com", ["b@example.org"], body) == [250, 250, 354, 451]
            reply = await client.command("MAIL FROM:<a@example.com> SIZE=400")
            assert str(reply).startswith("451 4.7.1 Rate limit client-1h (1000 octets in 1h) is reached")
            await client.command("MAIL FROM:<a@example.com> SIZE=1001", 550)
            assert (await send_on(client, "a@example.com", ["b@example.org"], b"x" * 198 + b"\r\n"))[
                -1
            ] == 250
            assert await send_on(client, "a@example.com", ["b@example.org"], body) == [451]
        assert sum(row["size"] for row in running.rows()) == 1000


@pytest.mark.parametrize("task_type", [None, "mention"])
async def test_of_a_hundred_in_parallel_exactly_ten_pass(
    start: Any, upstream: ScriptedUpstream, task_type: str | None
) -> None:
    limits = [limit(max=10) | ({"task_type": task_type} if task_type else {})]
    async with start(upstream.port, limits=limits) as running:
        ends = await asyncio.gather(
            *(send(running.port, "a@example.com", ["b@example.org"], MENTION) for _ in range(100))
        )
        assert Counter(codes[-1] for codes in ends) == {250: 10, 451: 90}
        assert len(running.rows()) == len(upstream.accepted) == 10


async def test_a_limit_that_observes_lets_everything_pass(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, limits=[limit(max=1, action="observe")]) as running:
        for _ in range(3):
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
        assert running.metric("limit_hits_total", limit="sender-1d", action="observe") == 2
        assert running.metric("client_rejects_total", reason="limit") == 0


async def test_exceptions_are_neither_held_nor_counted(start: Any, upstream: ScriptedUpstream) -> None:
    excepted = {"sender": "postmaster@*", "recipient": ["*@example.com"], "task_type": "reset"}
    limits = [limit(scope="all", max=1, exceptions=excepted)]
    reset = b"X-Task-Type: reset\r\n\r\ntext\r\n"
    async with start(upstream.port, limits=limits) as running:
        for sender, recipient, content, code in (
            ("postmaster@example.net", "b@example.org", OTHER, 250),
            ("a@example.net", "b@example.com", OTHER, 250),
            ("a@example.net", "b@example.org", reset, 250),
            ("a@example.net", "b@example.org", OTHER, 250),
            ("c@example.net", "b@example.org", OTHER, 451),
            ("postmaster@example.net", "b@example.org", OTHER, 250),
            ("a@example.net", "b@example.org", reset, 250),
        ):
            assert (await send(running.port, sender, [recipient], content))[-1] == code


async def test_a_reload_changes_limits_and_keeps_what_was_counted(
    start: Any, settings_for: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port, limits=[limit(max=1)]) as running:

        async def limited(*limits: dict[str, Any]) -> None:
            await reload(running.relay, lambda: settings_for(upstream.port, limits=list(limits)))

        async def last(sender: str = "a@example.com", content: bytes = OTHER) -> int:
            return (await send(running.port, sender, ["b@example.org"], content))[-1]

        assert [await last(), await last()] == [250, 451]
        await limited(limit(max=3, name="more"))
        assert [await last(), await last(), await last()] == [250, 250, 451]
        assert running.metric("limit_hits_total", limit="more", action="defer") == 1
        await limited()
        assert await last() == 250
        await limited(limit(max=4, action="reject"))
        assert await last() == 550
        await limited(MENTIONS | {"max": 1})
        assert [await last(), await last(content=MENTION), await last(content=MENTION)] == [250, 250, 451]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([{"max": 2}], [{"max": 1}]),
        ([{"max": 1}, {"max": 9, "name": "far", "action": "observe"}], None),
    ],
    ids=["another maximum", "two of a kind"],
)
@pytest.mark.parametrize("reached", ["RCPT", "end_of_data"])
async def test_a_message_that_is_under_way_at_a_reload_counts(
    reached: str, before: list[Any], after: list[Any] | None, start: Any, settings_for: Any
) -> None:
    go_on = asyncio.Event()
    limits, changed = ([limit(**each) for each in given] for given in (before, after or before))
    async with (
        ScriptedUpstream({reached: [Delay(go_on)]}) as upstream,
        start(upstream.port, limits=limits) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        sending = asyncio.create_task(send_on(client, "a@example.com", ["b@example.org"]))
        if reached == "RCPT":
            await upstream.wait_for(lambda: "RCPT" in verbs(upstream))
        else:
            await upstream.message()
        await reload(running.relay, lambda: settings_for(upstream.port, limits=changed))
        assert await send(running.port, "a@example.com", ["b@example.org"]) == [451]
        go_on.set()
        assert (await sending)[-1] == 250
        assert await send(running.port, "a@example.com", ["b@example.org"]) == [451]


async def test_a_higher_maximum_counts_what_it_took_no_look_at_before(
    start: Any, settings_for: Any, upstream: ScriptedUpstream
) -> None:
    """Of what the store has, a maximum asks for as much as reaches it."""
    async with start(upstream.port) as running:
        for _ in range(5):
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
    async with start(upstream.port, limits=[limit(max=2)]) as running:
        codes = [(await send(running.port, "a@example.com", ["b@example.org"]))[-1]]
        await reload(running.relay, lambda: settings_for(upstream.port, limits=[limit(max=6)]))
        codes += [(await send(running.port, "a@example.com", ["b@example.org"]))[-1] for _ in range(2)]
        assert codes == [451, 250, 451]


async def test_a_maximum_that_is_raised_while_the_store_is_asked(
    start: Any, settings_for: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that comes reaches no further back than the one before takes."""
    asked, answer = asyncio.Event(), asyncio.Event()
    look_up = StoredCounts.look_up

    async def slowly(*arguments: Any) -> Any:
        found = await look_up(*arguments)
        asked.set()
        await answer.wait()
        return found

    monkeypatch.setattr(limits_module, "ASK_TIMEOUT_S", 3600.0)
    async with start(upstream.port) as running:
        for _ in range(3):
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
    monkeypatch.setattr(StoredCounts, "look_up", slowly)
    async with start(upstream.port, limits=[limit(max=2)]) as running, Client(running.port) as client:
        await client.ehlo()
        client.send_unread(b"MAIL FROM:<a@example.com>\r\n")
        await asked.wait()
        await reload(running.relay, lambda: settings_for(upstream.port, limits=[limit(max=4)]))
        answer.set()
        await client.expect(250)
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451


@pytest.mark.parametrize(("on_error", "codes"), [("allow", [250, 250, 451]), ("defer", [451, 451, 451])])
async def test_while_the_store_cannot_be_asked(
    start: Any,
    upstream: ScriptedUpstream,
    on_error: str,
    codes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with start(upstream.port, limits=[limit(on_error=on_error)]) as running:
        assert (await send(running.port, "known@example.com", ["b@example.org"]))[-1] == 250

        async def away(*_: object) -> list[object]:
            raise StoreError("the store is away")

        monkeypatch.setattr(StoredCounts, "look_up", away)
        # What is not known goes by what this relay sends, or waits; what is known stays exact.
        last = [(await send(running.port, "a@example.com", ["b@example.org"]))[-1] for _ in range(3)]
        assert last == codes
        last = [(await send(running.port, "known@example.com", ["b@example.org"]))[-1] for _ in range(2)]
        assert last == [250, 451]


async def test_a_count_that_is_known_is_asked_for_again_now_and_then(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store has by another way counts in the end, and holds up nobody before."""
    monkeypatch.setattr(limits_module, "REFRESH_S", -1.0)
    async with start(upstream.port, limits=[limit(max=3)]) as running:
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
        in_force = running.relay.reception.services.limits
        with contextlib.closing(sqlite3.connect(running.database)) as other, other:
            other.execute("CREATE TEMP TABLE more AS SELECT * FROM task_done")
            other.execute("UPDATE more SET id = id + 1, task_id = 'f' || substr(task_id, 2)")
            other.execute("INSERT INTO task_done SELECT * FROM more")
        for code in (250, 451):
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == code
            await eventually(lambda: not in_force._asking)
    assert len(upstream.messages) == 2


@pytest.mark.parametrize("asking", [False, True], ids=["held", "being asked for"])
async def test_a_count_that_a_message_waits_in_is_not_forgotten(
    asking: bool, start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many others there are, and must be, beyond what is kept."""
    answer = asyncio.Event()
    look_up = StoredCounts.look_up

    async def slowly(self: StoredCounts, rule: Any, key: str, *others: Any) -> Any:
        if asking and key == "a@example.com":
            await answer.wait()
        return await look_up(self, rule, key, *others)

    monkeypatch.setattr(StoredCounts, "look_up", slowly)
    monkeypatch.setattr(limits_module, "ASK_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(limits_module, "MAX_TALLIES", 1)
    async with start(upstream.port, limits=[limit(max=1)]) as running, Client(running.port) as client:
        await client.ehlo()
        client.send_unread(b"MAIL FROM:<a@example.com>\r\n")
        if not asking:
            await client.expect(250)
        for number in range(3):
            assert (await send(running.port, f"{number}@example.com", ["b@example.org"]))[-1] == 250
        answer.set()
        if asking:
            await client.expect(250)
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451


async def test_rows_in_the_spool_count_also_after_a_restart(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked(*_: object) -> None:
        raise StoreError("locked")

    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "write", locked)
        async with start(upstream.port, limits=[limit(max=3)]) as running:
            for _ in range(2):
                assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
            assert running.rows() == []
        async with start(upstream.port, limits=[limit(max=3)]) as running:
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 250
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451
            assert running.rows() == []
    async with start(upstream.port, limits=[limit(max=3)]) as running:
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451
        async with asyncio.timeout(10):
            while len(running.rows()) < 3:
                await asyncio.sleep(0.02)
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451
    assert len(upstream.accepted) == 3


async def test_what_the_spool_alone_has_counts_behind_another_look_at_the_store(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked(*_: object) -> None:
        raise StoreError("locked")

    monkeypatch.setattr(limits_module, "REFRESH_S", -1.0)
    monkeypatch.setattr(SqliteStore, "write", locked)
    async with start(upstream.port, limits=[limit()]) as running:
        in_force = running.relay.reception.services.limits
        for code in (250, 250, 451):
            assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == code
            await eventually(lambda: not in_force._asking)
    assert len(upstream.accepted) == 2


async def test_a_type_that_a_limit_names_is_counted_by_its_name(
    start: Any, upstream: ScriptedUpstream
) -> None:
    named = limit(task_type=["mention", "news*"], exceptions={"task_type": ["invoice"]})
    async with start(upstream.port, limits=[named]) as running:
        for name in ("mention", "invoice", "news1"):
            content = MENTION.replace(b"mention", name.encode())
            assert (await send(running.port, "a@example.com", ["b@example.org"], content))[-1] == 250
        for name, rows in {"mention": 1, "invoice": 1, "other": 1}.items():
            assert running.metric("records_total", task_type=name) == rows
