"""Messages whose end of data went up without a verdict: what the client hears, what is kept, what ends it.

Each case with a client that stays and with one that has gone, with the store there and with the store away:
neither changes what is kept in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from relay import maillog
from relay.records import journal as journal_module
from tests.support.client import Client
from tests.support.databases import locked
from tests.support.upstream import (
    CHUNKING,
    Close,
    Delay,
    Garbage,
    HalfReply,
    Reset,
    ScriptedUpstream,
    Silence,
)
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.conftest import Running

CONTENT = b"Message-ID: <1@example.test>\r\nX-Task-ID: job-1\r\nX-Task-Type: mention\r\n\r\ntext\r\n"
COMMANDS = (
    b"MAIL FROM:<a@example.test>",
    b"RCPT TO:<b@example.test>",
    b"RCPT TO:<no@example.test>",
    b"DATA",
)
REFUSE_ONE = {"no@": b"550 5.1.1 unknown\r\n"}
DOUBT = "451 4.4.2 The upstream server did not answer: the message may have been sent, see "
AWAY = {"commit_timeout": "50ms"}


@pytest.fixture
def log() -> Iterator[io.BytesIO]:
    """What the relay logs."""
    stream = io.BytesIO()
    maillog.configure("json", "info", stream)
    yield stream
    maillog.configure("json", "info")


def doubts(running: Running) -> list[dict[str, Any]]:
    return running.rows("SELECT * FROM task_in_doubt ORDER BY id")


def in_use(running: Running) -> int:
    return running.relay.records.journal.in_use


async def send(running: Running, client: Client, upstream: ScriptedUpstream) -> None:
    """Send a message up to its end of data, which the upstream has read."""
    await client.ehlo()
    for command in COMMANDS:
        await client.command(command)
    await client.send(CONTENT + b".\r\n")
    await upstream.message()
    assert in_use(running) == 1


def overdue(running: Running) -> None:
    """Let the verdict be overdue, at several looks."""
    for seconds in (1, 2, 3):
        look_at_verdicts(running, running.pool.end_of_data_timeout + seconds)


def look_at_verdicts(running: Running, seconds: float) -> None:
    """As `look` does, but not at sessions, which would be idle for too long by then."""
    now = asyncio.get_running_loop().time() + seconds
    for message in tuple(running.relay.reception.services.settling):
        message.check(now)


async def leave(running: Running, client: Client) -> None:
    client.reset()
    await eventually(lambda: "0 sessions" in repr(running.relay.reception))


@contextlib.asynccontextmanager
async def store_away(running: Running, *, away: bool) -> AsyncIterator[None]:
    if not away:
        yield
        return
    with locked(running.database):
        yield
    await eventually(lambda: running.relay.records.spool.rows == 0)


stays = pytest.mark.parametrize("client_stays", [True, False], ids=["client_stays", "client_leaves"])
away = pytest.mark.parametrize("away", [False, True], ids=["store_there", "store_away"])


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (Close(), "closed by the upstream"),
        (Reset(), "lost"),
        (HalfReply(), "closed by the upstream"),
        (Garbage(), "out of step"),
    ],
    ids=["close", "reset", "half_reply", "garbage"],
)
@stays
@away
async def test_a_connection_that_ends_without_a_verdict(
    end: Any, reason: str, client_stays: bool, away: bool, start: Any, upstream: ScriptedUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.script = {"RCPT": REFUSE_ONE, "end_of_data": [Delay(go_on, end)]}
    async with start(upstream.port, records=AWAY) as running, Client(running.port) as client:
        await send(running, client, upstream)
        async with store_away(running, away=away):
            if not client_stays:
                await leave(running, client)
            go_on.set()
            if client_stays:
                assert str(await client.expect(451)).startswith(DOUBT)
            await counted(running, in_doubt=1)
            assert in_use(running) == 0
        (entry,) = doubts(running)
        data = json.loads(entry["data"])
        assert entry["reason"].startswith(reason)
        assert (entry["client_task_id"], entry["task_type"]) == ("job-1", "mention")
        assert (entry["sender"], entry["sender_domain"]) == ("a@example.test", "example.test")
        assert (entry["message_id"], entry["upstream"]) == ("<1@example.test>", "primary")
        assert json.loads(entry["recipients"]) == ["b@example.test"]
        assert entry["size"] == len(CONTENT)
        assert entry["client"] == "127.0.0.1"
        assert data["refused"] == [{"recipient": "no@example.test", "reply": "550 5.1.1 unknown"}]
        assert (data["client_reply"] or "").startswith(DOUBT if client_stays else "")
        assert "journal" not in data
        assert running.rows() == []
        assert running.metric("records_total", task_type="other") == 0
        if client_stays:  # and its session goes on
            replies = await client.message("a@example.test", ["c@example.test"], CONTENT)
            assert replies[-1].code == 250
            await counted(running, in_doubt=1, accepted=1)
            await eventually(running.rows)  # it may come by the spool
            assert len(doubts(running)) == len(running.rows()) == 1
            await client.quit()
        await nothing_left(running)
    assert len(upstream.messages) == 1 + client_stays


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (b"250 2.0.0 late\r\n", "accepted"),
        (b"299 2.9.9 late\r\n", "accepted"),
        (b"450 4.0.0 late\r\n", "deferred"),
        (b"550 5.0.0 late\r\n", "rejected"),
        (b"421 4.0.0 late\r\n", "deferred"),
        (Close(b"421 4.0.0 late\r\n"), "deferred"),
        (Close(), "in_doubt"),
    ],
    ids=["250", "299", "450", "550", "421", "421_close", "close"],
)
@stays
@away
async def test_a_verdict_that_is_overdue(
    verdict: Any, outcome: str, client_stays: bool, away: bool, start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"RCPT": REFUSE_ONE, "end_of_data": [Delay(answer, verdict)]}
    async with start(upstream.port, records=AWAY) as running, Client(running.port) as client:
        await send(running, client, upstream)
        if not client_stays:
            await leave(running, client)
        async with store_away(running, away=away):
            look_at_verdicts(running, running.pool.end_of_data_timeout - 1)
            assert in_use(running) == 1
            overdue(running)
            if client_stays:
                assert str(await client.expect(451)).startswith(DOUBT)
            await eventually(lambda: in_use(running) == 0)
            assert outcomes(running) == {}, "nothing is known yet"
        (entry,) = doubts(running)
        assert entry["reason"] == "no answer to the end of data within 600 s"
        heard = json.loads(entry["data"])["client_reply"]
        assert (heard or "").startswith(DOUBT if client_stays else "")
        assert running.rows() == []
        async with store_away(running, away=away):
            answer.set()
            await counted(running, **{outcome: 1})
        if outcome == "accepted":
            (row,) = await eventually(running.rows)  # it may come by the spool, on a busy machine
            assert (row["task_id"], row["client_task_id"]) == (entry["task_id"], "job-1")
            assert row["upstream_reply"].endswith("late")
            assert json.loads(row["data"])["client_reply"] == heard
        else:
            assert running.rows() == []
        await eventually(lambda: doubts(running) == ([entry] if outcome == "in_doubt" else []))
        if client_stays:
            await client.quit()
        await nothing_left(running)
        assert in_use(running) == 0
        assert outcomes(running) == {outcome: 1}
    assert len(upstream.messages) == 1


async def test_the_log_says_at_once_that_a_verdict_is_overdue(
    start: Any, upstream: ScriptedUpstream, log: io.BytesIO
) -> None:
    answer = asyncio.Event()
    upstream.script = {"RCPT": REFUSE_ONE, "end_of_data": [Delay(answer)]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await send(running, client, upstream)
        overdue(running)
        await client.expect(451)
        answer.set()
        await counted(running, accepted=1)
        (row,) = running.rows()
        await client.quit()
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    late, message = (line for line in lines if line["event"] in ("in doubt", "message"))
    assert (late["event"], late["level"], late["awaited"]) == ("in doubt", "warning", True)
    assert late["reason"] == "no answer to the end of data within 600 s"
    assert (message["event"], message["outcome"]) == ("message", "accepted")
    told_later = {"outcome", "reply", "time", "level", "event", "upstream_s", "commit_s", "total_s"}
    assert {name: message[name] for name in message.keys() - told_later} == {
        name: late[name] for name in message.keys() - told_later
    }
    assert late["task_id"] == row["task_id"]


async def test_a_verdict_that_came_in_time_is_given_although_its_commit_takes_longer(
    start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"RCPT": REFUSE_ONE, "end_of_data": [Delay(answer)]}
    async with start(upstream.port, records={"commit_timeout": "30s"}) as running:
        async with Client(running.port) as client:
            await send(running, client, upstream)
            with locked(running.database):
                answer.set()
                await eventually(lambda: running.metric("records_pending") == 1)
                overdue(running)
            await client.expect(250)
            await counted(running, accepted=1)
        assert doubts(running) == []
        assert in_use(running) == 0


@pytest.mark.parametrize("late", [False, True], ids=["doubt", "late_refusal"])
async def test_a_message_is_under_way_until_what_becomes_of_its_entry_is_durable(
    late: bool, start: Any, upstream: ScriptedUpstream
) -> None:
    """So long its place in the spool is kept: the entry, or its end, may have to go there."""
    answer = asyncio.Event()
    upstream.script = {"end_of_data": [Delay(answer, b"550 5.0.0 late\r\n" if late else Close())]}
    async with start(upstream.port, records={"commit_timeout": "30s"}) as running:
        async with Client(running.port) as client:
            await send(running, client, upstream)
            if late:
                overdue(running)
                await client.expect(451)
                await eventually(lambda: in_use(running) == 0)
            with locked(running.database):
                answer.set()
                if not late:
                    await client.expect(451)
                await eventually(lambda: running.metric("records_pending") == 1)
                assert "1 settling" in repr(running.relay.reception)
                assert running.relay.records.spool.reserve.promised > 0
                assert outcomes(running) == {}
            await counted(running, **{"rejected" if late else "in_doubt": 1})
        await nothing_left(running)
        assert len(doubts(running)) == (not late)


@stays
@away
async def test_a_stop_that_does_not_wait_any_longer_leaves_the_entry(
    client_stays: bool, away: bool, settings_for: Any, upstream: ScriptedUpstream, start: Any
) -> None:
    upstream.script = {"RCPT": REFUSE_ONE, "end_of_data": Silence()}
    server = {"drain_timeout": "50ms"}
    async with contextlib.AsyncExitStack() as stack:
        async with start(upstream.port, records=AWAY, server=server) as running:
            client = await stack.enter_async_context(Client(running.port))
            await send(running, client, upstream)
            if not client_stays:
                await leave(running, client)
            if away:
                stack.enter_context(locked(running.database))
        if client_stays:
            assert str(await client.expect(451)).startswith(DOUBT)
        assert outcomes(running) == {"in_doubt": 1}
    async with start(upstream.port) as running:  # what was in the spool comes back
        await eventually(lambda: running.relay.records.spool.rows == 0)
        (entry,) = doubts(running)
        assert running.relay.records.journal.found == []
        assert entry["reason"] == "the relay stopped before the upstream answered"
        assert "journal" not in json.loads(entry["data"])


async def test_chunks_that_are_up_when_the_connection_ends_are_in_doubt(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.extensions += CHUNKING
    upstream.script = {"end_of_data": [Close(), b"550 5.7.1 no\r\n"]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        replies = await client.chunks(b"a@example.test", [b"b@example.test"], [CONTENT[:20], CONTENT[20:]])
        assert str(replies[-1]).startswith(DOUBT)
        (entry,) = doubts(running)
        assert entry["size"] == len(CONTENT)
        replies = await client.chunks(b"a@example.test", [b"b@example.test"], [CONTENT])
        assert replies[-1].code == 550
        await counted(running, in_doubt=1, rejected=1)
        assert len(doubts(running)) == 1
        assert in_use(running) == 0


async def test_a_doubt_that_cannot_be_kept_changes_nothing_for_the_client(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = {"end_of_data": [Close(), None]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()

        def fails(_: object) -> None:
            raise MemoryError("nothing left")

        with monkeypatch.context() as patch:
            patch.setattr(running.relay.records.recorder, "record", fails)
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert str(replies[-1]).startswith(DOUBT)
            await counted(running, in_doubt=1)
        assert in_use(running) == 1  # for the next start
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
    async with start(upstream.port) as running:
        await eventually(lambda: in_use(running) == 0)
        (entry,) = doubts(running)
        assert json.loads(entry["data"])["journal"] is True


async def test_a_verdict_in_time_leaves_nothing_in_the_journal(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"end_of_data": [None, b"450 4.0.0 no\r\n", b"550 5.0.0 no\r\n", b"421 4.0.0 no\r\n"]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        codes = []
        for _ in range(4):
            codes.append((await client.message("a@example.test", ["b@example.test"], CONTENT))[-1].code)
            assert in_use(running) == 0
        assert codes == [250, 450, 550, 451]
        assert doubts(running) == []
        slots = [running.relay.records.journal.enter(b"x") for _ in range(2)]
        assert slots == [0, 1]  # the one slot was used again and again


async def test_without_room_in_the_journal_nothing_goes_up(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in COMMANDS:
            await client.command(command)
        journal = running.relay.records.journal
        taken = [journal.enter(b"x") for _ in range(journal.slots)]
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "posix_fallocate", full)
            await client.send(CONTENT + b".\r\n")
            assert (await client.expect(451)).text.startswith("4.3.0 ")
            assert (await client.command(COMMANDS[0], 451)).text.startswith("4.3.0 ")
            ready, lines = running.relay.readiness()
            assert not ready
            assert "No space left on device" in lines[0]
            assert outcomes(running) == {"refused": 2}
            assert running.metric("client_rejects_total", reason="records") == 2
            assert running.relay.records.spool.reserve.promised == 0  # no row comes to take its place
        journal.free(taken[0] or 0)
        assert running.relay.readiness()[0]
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
        for slot in taken[1:]:
            journal.free(slot or 0)
    assert len(upstream.messages) == 1
    assert [message.complete for connection in upstream.connections for message in connection.messages] == [
        False,
        True,
    ]


async def test_more_recipients_than_a_slot_holds(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the relay were killed with two such messages under way: neither spoils the other's slot."""
    recipients = [f"{number}.{'r' * 40}@example.test" for number in range(400)]
    async with start(upstream.port) as running, Client(running.port) as client:
        monkeypatch.setattr(running.relay.records.journal, "free", lambda _: None)
        await client.ehlo()
        for sender in ("a@example.test", "b@example.test"):
            assert (await client.message(sender, recipients, CONTENT))[-1].code == 250
    async with start(upstream.port) as running:
        found = [each.doubt for each in running.relay.records.journal.found]
        assert [each.sender for each in found] == ["a@example.test", "b@example.test"]
        for each in found:
            assert each.data["recipient_count"] == len(recipients)
            assert each.recipients == tuple(recipients[: len(each.recipients)])


async def test_what_the_store_has_already_makes_no_entry(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the relay were killed after the row's commit, before the slot was freed."""
    async with start(upstream.port) as running, Client(running.port) as client:
        monkeypatch.setattr(running.relay.records.journal, "free", lambda _: None)
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[-1].code == 250
    async with start(upstream.port) as running:
        assert len(running.relay.records.journal.found) == 1
        await eventually(lambda: in_use(running) == 0)
        assert doubts(running) == []
        assert len(running.rows()) == 1


async def test_what_the_spool_has_already_makes_no_entry(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with start(upstream.port, records=AWAY) as running, Client(running.port) as client:
            monkeypatch.setattr(running.relay.records.journal, "free", lambda _: None)
            await client.ehlo()
            stack.enter_context(locked(running.database))
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert replies[-1].code == 250
        assert running.rows() == []
    async with start(upstream.port) as running:
        assert len(running.relay.records.journal.found) == 1
        await eventually(lambda: in_use(running) == 0 and running.relay.records.spool.rows == 0)
        assert doubts(running) == []
        assert len(running.rows()) == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "rows.db")) as connection:
        assert connection.execute("SELECT count(*) FROM task_in_doubt").fetchone() == (0,)
