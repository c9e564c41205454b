"""The relay stops: no new session, what is under way is finished, nothing is left running or unrecorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import pytest

from relay.app import Relay
from tests.conftest import Running
from tests.support.client import Client
from tests.support.upstream import Delay, ScriptedUpstream, Silence
from tests.support.watch import counted, eventually, outcomes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relay.settings import Settings

MAIL = b"MAIL FROM:<a@example.test>"
RCPT = b"RCPT TO:<b@example.test>"
CONTENT = b"Subject: one\r\n\r\ntext\r\n"
LONG = "1h"
SHORT = "50ms"


def threads() -> set[threading.Thread]:
    """All but the event loop's own, which end with it."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


class Stopping:
    """A relay that a test starts, begins to stop, and sees end."""

    def __init__(self, settings: Settings, database: Path) -> None:
        self.relay = Relay(settings)
        self.database = database
        self._stop: asyncio.Task[None] | None = None
        self._before: set[asyncio.Task[Any]] = set()
        self.running: Running

    async def start(self) -> Running:
        self._before = asyncio.all_tasks()
        self._threads = threads()
        await self.relay.start()
        self.running = Running(self.relay, self.database)
        return self.running

    async def begin(self) -> None:
        """Begin to stop; return once the relay drains."""
        self._stop = asyncio.create_task(self.relay.stop())
        await eventually(lambda: self.relay.reception.draining)

    @property
    def stopped(self) -> bool:
        return self._stop is not None and self._stop.done()

    async def end(self, upstream: ScriptedUpstream) -> None:
        """Wait for the end, and fail if anything is left of the relay: a task, a thread, a connection."""
        assert self._stop is not None
        async with asyncio.timeout(15):
            await self._stop
        assert repr(self.relay.reception) == "<Reception: 0 sessions, 0 settling>"
        assert repr(self.running.pool) == "<Pool primary: 0 active, 0 idle, 0 connecting, 0 waiting>"
        await upstream.wait_for(lambda: not upstream.open_connections)
        ours = {task for connection in upstream.connections if (task := connection.task) is not None}
        await eventually(lambda: not (asyncio.all_tasks() - self._before - ours), lambda: asyncio.all_tasks())
        await eventually(lambda: threads() <= self._threads, threads)


@pytest.fixture
async def stopping(settings_for: Callable[..., Settings], tmp_path: Path, upstream: ScriptedUpstream) -> Any:
    """Return a starter of relays that is sure to stop them: `stopping(section={...})`."""
    async with contextlib.AsyncExitStack() as stack:

        async def begin(**over: Any) -> Stopping:
            found = Stopping(settings_for(upstream.port, **over), tmp_path / "rows.db")
            await found.start()
            stack.push_async_callback(_stopped, found)
            return found

        yield begin


async def _stopped(found: Stopping) -> None:
    """Stop it at once if its test has failed before its end; no failure may cost drain_timeout."""
    if not found.stopped:
        for session in tuple(found.relay.reception._sessions):
            session.cut()
        await (found._stop or found.relay.stop())


async def say(client: Client, *commands: bytes) -> None:
    await client.ehlo()
    for command in commands:
        await client.command(command)


async def test_an_idle_session_hears_421(stopping: Any, upstream: ScriptedUpstream) -> None:
    relay = await stopping(server={"drain_timeout": LONG})
    async with Client(relay.running.port) as silent, Client(relay.running.port) as greeted:
        await silent.greeting()
        await greeted.ehlo()
        await relay.begin()
        for client in (silent, greeted):
            assert (await client.expect(421)).text.startswith("4.3.2 ")
            await client.expect_eof()
        await relay.end(upstream)


async def test_new_connections_are_refused(stopping: Any, upstream: ScriptedUpstream) -> None:
    relay = await stopping(server={"drain_timeout": LONG})
    async with Client(relay.running.port) as client:
        await say(client, MAIL)
        await relay.begin()
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(relay.running.port)
        assert not relay.stopped
        await client.command("QUIT", 221)
        await relay.end(upstream)


async def test_who_comes_in_while_it_drains_is_turned_away(stopping: Any, upstream: ScriptedUpstream) -> None:
    """From the queue of the kernel, say."""
    relay = await stopping()
    relay.relay.reception.draining = True
    async with Client(relay.running.port) as client:
        assert (await client.expect(421)).text.startswith("4.3.2 ")
        await client.expect_eof()
    assert relay.running.metric("client_rejects_total", reason="draining") == 1
    await relay.begin()
    await relay.end(upstream)


@pytest.mark.parametrize("said", range(1, 4), ids=["after_MAIL", "after_RCPT", "after_DATA"])
async def test_a_transaction_is_finished_then_421(
    said: int, stopping: Any, upstream: ScriptedUpstream
) -> None:
    relay = await stopping(server={"drain_timeout": LONG})
    commands = (MAIL, RCPT, b"DATA")
    async with Client(relay.running.port) as client:
        await say(client, *commands[:said])
        await relay.begin()
        for command in commands[said:]:
            await client.command(command)
        await client.send(CONTENT + b".\r\n")
        await client.expect(250)
        assert (await client.expect(421)).text.startswith("4.3.2 ")
        await client.expect_eof()
        await relay.end(upstream)
    assert upstream.messages[0].content == CONTENT
    assert len(relay.running.rows()) == 1
    assert outcomes(relay.running) == {"accepted": 1}


@pytest.mark.parametrize("command", [b"RSET", b"EHLO client.test"])
async def test_a_transaction_that_is_given_up_is_followed_by_421(
    command: bytes, stopping: Any, upstream: ScriptedUpstream
) -> None:
    relay = await stopping(server={"drain_timeout": LONG})
    async with Client(relay.running.port) as client:
        await say(client, MAIL)
        await relay.begin()
        await client.command(command, 250)
        await client.expect(421)
        await client.expect_eof()
        await relay.end(upstream)
    assert outcomes(relay.running) == {"aborted": 1}


async def test_a_second_message_is_not_begun(stopping: Any, upstream: ScriptedUpstream) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": Delay(answer)}
    relay = await stopping(server={"drain_timeout": LONG})
    async with Client(relay.running.port) as client:
        await say(client, MAIL, RCPT, b"DATA")
        await client.send(CONTENT + b".\r\n" + MAIL + b"\r\n")
        await upstream.message()
        await relay.begin()
        answer.set()
        await client.expect(250)
        await client.expect(421)
        await client.expect_eof()
        await relay.end(upstream)
    assert outcomes(relay.running) == {"accepted": 1}


async def test_a_verdict_is_awaited(stopping: Any, upstream: ScriptedUpstream) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": Delay(answer)}
    relay = await stopping(server={"drain_timeout": LONG})
    async with Client(relay.running.port) as client:
        await say(client, MAIL, RCPT, b"DATA")
        await client.send(CONTENT + b".\r\n")
        await upstream.message()
        await relay.begin()
        assert not relay.stopped
        answer.set()
        await client.expect(250)
        await client.expect(421)
        await relay.end(upstream)
    assert len(relay.running.rows()) == 1


async def test_a_verdict_is_awaited_also_when_its_client_has_gone(
    stopping: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": Delay(answer)}
    relay = await stopping(server={"drain_timeout": LONG})
    async with Client(relay.running.port) as client:
        await say(client, MAIL, RCPT, b"DATA")
        await client.send(CONTENT + b".\r\n")
        await upstream.message()
        client.reset()
        await eventually(lambda: "0 sessions, 1 settling" in repr(relay.relay.reception))
        await relay.begin()
        await asyncio.sleep(0.05)  # the longer it were, the clearer
        assert not relay.stopped
        answer.set()
        await relay.end(upstream)
    (row,) = relay.running.rows()
    assert json.loads(row["data"]) == {"relay": "relay.test", "client_reply": None}
    assert outcomes(relay.running) == {"accepted": 1}


async def test_a_verdict_that_does_not_come_in_time_is_in_doubt(
    stopping: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"end_of_data": Silence()}
    relay = await stopping(server={"drain_timeout": SHORT})
    async with Client(relay.running.port) as client:
        await say(client, MAIL, RCPT, b"DATA")
        await client.send(CONTENT + b".\r\n")
        await upstream.message()
        await relay.begin()
        assert (await client.expect(451)).text.startswith("4.4.2 ")
        assert (await client.expect_closed())[:10] in (b"421 4.3.2 ", b"")
        await relay.end(upstream)
    assert outcomes(relay.running) == {"in_doubt": 1}
    assert relay.running.rows() == []


async def test_a_row_that_is_not_durable_in_time_is_awaited(
    stopping: Any, upstream: ScriptedUpstream
) -> None:
    """The upstream has the message: its client must not be cut off while the row is on its way."""
    relay = await stopping(server={"drain_timeout": SHORT})
    async with Client(relay.running.port) as client, Client(relay.running.port) as unfinished:
        await say(unfinished, MAIL)
        await say(client, MAIL, RCPT, b"DATA")
        with contextlib.closing(sqlite3.connect(relay.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await client.send(CONTENT + b".\r\n")
            await eventually(lambda: relay.running.metric("records_pending") == 1)
            await relay.begin()
            await unfinished.expect_closed()  # the time is over
            other.execute("ROLLBACK")
        await client.expect(250)
        await relay.end(upstream)
    assert len(relay.running.rows()) == 1


@pytest.mark.parametrize("said", range(1, 5), ids=["after_MAIL", "after_RCPT", "after_DATA", "in_the_body"])
async def test_a_client_that_does_not_finish_in_time_is_cut_off(
    said: int, stopping: Any, upstream: ScriptedUpstream
) -> None:
    relay = await stopping(server={"drain_timeout": SHORT})
    async with Client(relay.running.port) as client:
        await say(client, *(MAIL, RCPT, b"DATA")[:said])
        if said == 4:
            await client.send(CONTENT)
        await relay.begin()
        await client.expect_closed()
        await relay.end(upstream)
    assert upstream.messages == []
    assert relay.running.rows() == []
    await counted(relay.running, aborted=1)


async def test_a_client_that_waits_for_a_connection_is_not_waited_for(
    stopping: Any, upstream: ScriptedUpstream
) -> None:
    relay = await stopping(
        server={"drain_timeout": SHORT}, upstream={"max_connections": 1, "lease_wait_timeout": LONG}
    )
    async with Client(relay.running.port) as first, Client(relay.running.port) as second:
        await say(first, MAIL)
        await second.ehlo()
        await second.send(MAIL + b"\r\n")
        await eventually(lambda: "1 waiting" in repr(relay.running.pool))
        await relay.begin()
        await first.expect_closed()
        await second.expect_closed()
        await relay.end(upstream)
    await counted(relay.running, aborted=2)


async def test_the_upstream_hears_quit(stopping: Any, upstream: ScriptedUpstream) -> None:
    relay = await stopping()
    await relay.begin()
    await relay.end(upstream)
    assert upstream.connections[0].lines[-1] == b"QUIT"


async def test_an_upstream_that_does_not_answer_quit_is_not_waited_for_long(
    stopping: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"QUIT": Silence()}
    relay = await stopping()
    await relay.begin()
    await relay.end(upstream)


async def test_whatever_a_drain_fails_with_all_is_closed(
    stopping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = await stopping()

    async def fail(_: float) -> None:
        raise OSError("cannot drain")

    monkeypatch.setattr(relay.relay.reception, "drain", fail)
    relay._stop = asyncio.create_task(relay.relay.stop())
    with pytest.raises(OSError, match="cannot drain"):
        await relay._stop
    await eventually(lambda: threads() <= relay._threads, threads)  # that of the database above all


async def test_a_stop_that_can_start_no_thread_leaves_none(
    stopping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a limit of memory or of tasks is reached: the process would stay for good."""
    relay = await stopping()

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(relay.relay.records.recorder._spooler._executor, "submit", fail)
    relay._stop = asyncio.create_task(relay.relay.stop())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await relay._stop
    await eventually(lambda: threads() <= relay._threads, threads)
