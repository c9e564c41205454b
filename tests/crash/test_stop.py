"""SIGTERM while messages flow: nothing is lost, nothing is unrecorded, the next start finds all in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.storm import Storm
from tests.support.upstream import Delay, ScriptedUpstream, Silence

SLACK_S = 10.0
"""Beyond `drain_timeout`: closing, and a busy machine."""
DESCRIPTORS = 64
"""Of the relay in a test where they run out."""
CONTENT = b"From: a@example.test\r\nX-Task-ID: 1\r\n\r\ntext\r\n"


async def test_sigterm_under_load_leaves_nothing_unrecorded(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port, server={"drain_timeout": "5s"}) as relay:
        async with Storm(relay, upstream) as applications:
            for _ in range(3):
                await relay.start()
                enough = applications.told_yes + 20
                await upstream.wait_for(partial(told, applications, enough), 30.0)
                began = time.monotonic()
                assert await relay.terminate() == 0
                assert time.monotonic() - began < 5 + SLACK_S
                assert list(relay.spool.glob("*.jsonl")) == []
                assert relay.log()[-1]["event"] == "stopped"
            await relay.start()
        assert await relay.terminate() == 0

    findings, figures = await applications.settle(killed=False)

    assert findings == []
    assert figures.accepted == figures.rows
    assert relay.errors() == ""


async def test_a_message_under_way_is_finished_within_the_drain_timeout(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    verdict = asyncio.Event()
    upstream.script = {"end_of_data": Delay(verdict)}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        async with Client(relay.port) as client, Client(relay.port) as idle:
            await client.ehlo()
            await idle.ehlo()
            sent = asyncio.create_task(client.message("a@example.test", ["b@example.test"], CONTENT))
            await upstream.message()
            ended = asyncio.create_task(relay.terminate())
            await relay.event("draining")
            await idle.expect(421)
            await idle.expect_eof()
            verdict.set()
            assert [reply.code for reply in await sent] == [250, 250, 354, 250]
            await client.expect(421)
            await client.expect_eof()
            assert await ended == 0
        assert [row["client_task_id"] for row in relay.rows()] == ["1"]


async def test_a_verdict_that_does_not_come_is_in_doubt_when_the_drain_timeout_ends(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"end_of_data": Silence()}
    async with RelayProcess(tmp_path, upstream.port, server={"drain_timeout": "1s"}) as relay:
        await relay.start()
        async with Client(relay.port) as client:
            await client.ehlo()
            sent = asyncio.create_task(client.message("a@example.test", ["b@example.test"], CONTENT))
            await upstream.message()
            began = time.monotonic()
            assert await relay.terminate() == 0
            assert 1.0 <= time.monotonic() - began < 1 + SLACK_S
            assert str((await sent)[-1]).startswith("451 4.4.2 ")
        assert relay.rows() == []
        (line,) = (line for line in relay.log() if line["event"] == "message")
        assert (line["outcome"], line["recipients"]) == ("in_doubt", ["b@example.test"])
    assert relay.errors() == ""


async def test_the_next_start_finds_its_files_in_order(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        for number in (1, 2):
            await relay.start()
            async with Client(relay.port) as client:
                await client.ehlo()
                replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
                assert replies[-1].code == 250
            assert await relay.terminate() == 0
            # The write-ahead log is gone: the file alone is the whole store, fit to be copied.
            assert sorted(path.name for path in relay.database.parent.iterdir()) == ["rows.db", "spool"]
            assert len(relay.rows()) == number
            assert relay.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
            assert [line for line in relay.log() if line["level"] not in ("info", "debug")] == []
    assert relay.errors() == ""


def told(applications: Storm, enough: int) -> bool:
    """Whether so many tries have been told 2yz."""
    return applications.told_yes > enough


# Signals


async def test_a_second_signal_hurries_and_a_third_changes_nothing(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"end_of_data": [Silence()]}
    async with RelayProcess(tmp_path, upstream.port, server={"drain_timeout": "1h"}) as relay:
        await relay.start()
        async with Client(relay.port) as client, Client(relay.port) as slow:
            await client.ehlo()
            await slow.ehlo()
            await slow.command(b"MAIL FROM:<a@example.test>", 250)
            sent = asyncio.create_task(client.message("a@example.test", ["b@example.test"], CONTENT))
            await upstream.message()
            os.kill(relay.pid, signal.SIGTERM)
            await relay.event("draining")
            for _ in range(2):
                os.kill(relay.pid, signal.SIGINT)
                await relay.event("hurrying")
            assert str((await sent)[-1]).startswith("451 4.4.2 ")
            await slow.expect_closed()
            assert await relay.ended(SLACK_S) == 0
        events = [line["event"] for line in relay.log()]
        assert events.count("hurrying") == 1
        assert events[-1] == "stopped"
        assert relay.rows() == []
        (doubt,) = relay.rows("SELECT * FROM task_in_doubt")
        assert doubt["client_task_id"] == "1"
    assert relay.errors() == ""


async def test_rows_are_made_durable_in_a_hurry_too(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port, server={"drain_timeout": "1h"}) as relay:
        async with Storm(relay, upstream) as applications:
            for _ in range(3):
                await relay.start()
                enough = applications.told_yes + 20
                await upstream.wait_for(partial(told, applications, enough), 30.0)
                relay.port = 0
                os.kill(relay.pid, signal.SIGTERM)
                os.kill(relay.pid, signal.SIGINT)
                assert await relay.ended(2 * SLACK_S) == 0
            await relay.start()
        assert await relay.terminate() == 0

    findings, figures = await applications.settle()
    told_yes = {key for key, code in applications.told.items() if code is not None and code < 300}
    rows = {row["client_task_id"] for row in relay.rows()}

    assert findings == []
    assert told_yes <= rows
    assert figures.rows == len(rows)
    assert relay.errors() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_during_the_start_ends_it_in_order(
    number: int, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"greeting": Silence()}  # the start waits for it, for `connect_timeout`
    async with RelayProcess(tmp_path, upstream.port, upstream={"connect_timeout": "1h"}) as relay:
        await relay.spawn()
        await upstream.wait_for(lambda: upstream.connections, 30.0)
        os.kill(relay.pid, number)
        assert await relay.ended(SLACK_S) == 0
        events = [line["event"] for line in relay.log()]
        assert events[-1] == "stopped"
        assert "started" not in events
        assert not relay.database.with_name("rows.db-wal").exists()
        assert relay.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert relay.errors() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_the_configuration_is_read_ends_it_in_order(
    number: int, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await reading_its_configuration(relay, number)
        assert await relay.ended(SLACK_S) == 0
        assert relay.log()[-1]["event"] == "stopped"
    assert relay.errors() == ""


async def test_a_hangup_while_the_configuration_is_read_reloads_behind_the_start(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await reading_its_configuration(relay, signal.SIGHUP)
        await relay.event("reloaded")
        assert await relay.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_start_that_fails_says_why_whatever_signal_came(
    number: int, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        relay.config.write_text(relay.config.read_text().replace("hostname", "hostnam"))
        await reading_its_configuration(relay, number)
        assert await relay.ended(SLACK_S) == 2
    assert 'server.hostnam: unknown key; did you mean "hostname"?' in relay.errors()


async def reading_its_configuration(relay: RelayProcess, number: int) -> None:
    """Start the relay, send the signal as it opens the file, then let it read that."""
    kept = relay.config.with_suffix(".kept")
    relay.config.rename(kept)
    os.mkfifo(relay.config)
    await relay.spawn()
    file = await asyncio.to_thread(relay.config.open, "w")
    relay.signal(number)
    with file:
        file.write(kept.read_text())
        kept.replace(relay.config)  # before the relay reads to the end of the pipe: a reload opens this one


async def test_a_hangup_during_the_start_reloads_behind_it(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    greets = asyncio.Event()
    upstream.script = {"greeting": Delay(greets)}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.spawn()
        await upstream.wait_for(lambda: upstream.connections, 30.0)
        os.kill(relay.pid, signal.SIGHUP)
        greets.set()
        await relay.event("started")
        await relay.event("reloaded")
        assert await relay.terminate() == 0


async def test_a_hangup_while_draining_is_ignored(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    verdict = asyncio.Event()
    upstream.script = {"end_of_data": Delay(verdict)}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        async with Client(relay.port) as client:
            await client.ehlo()
            sent = asyncio.create_task(client.message("a@example.test", ["b@example.test"], CONTENT))
            await upstream.message()
            os.kill(relay.pid, signal.SIGTERM)
            await relay.event("draining")
            os.kill(relay.pid, signal.SIGHUP)
            assert (await relay.event("reload ignored"))["reason"] == "the relay is stopping"
            verdict.set()
            assert (await sent)[-1].code == 250
            assert await relay.ended() == 0
        assert "reloaded" not in [line["event"] for line in relay.log()]


async def test_whoever_is_in_the_queue_when_a_drain_begins_is_answered(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        os.kill(relay.pid, signal.SIGSTOP)
        waiting = [await Client.connect(relay.port) for _ in range(20)]
        os.kill(relay.pid, signal.SIGTERM)
        os.kill(relay.pid, signal.SIGCONT)
        for client in waiting:
            replies = [await client.reply()]
            if replies[0].code == 220:
                replies.append(await client.reply())
            assert replies[-1].text.startswith("4.3.2 ")
            await client.expect_eof()
            client.wire.abort()
            await client.wire.ended()
        assert await relay.ended() == 0


async def test_without_a_file_descriptor_left_it_stops_in_order_all_the_same(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    verdict = asyncio.Event()
    upstream.script = {"end_of_data": Delay(verdict)}
    async with RelayProcess(tmp_path, upstream.port) as relay, contextlib.AsyncExitStack() as clients:
        relay.launcher = ("sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh")
        await relay.start()
        assert (await relay.get("/readyz"))[0] == 200
        client = await clients.enter_async_context(Client(relay.port))
        await client.ehlo()
        sent = asyncio.create_task(client.message("a@example.test", ["b@example.test"], CONTENT))
        await upstream.message()
        descriptors = Path(f"/proc/{relay.pid}/fd")
        async with asyncio.timeout(SLACK_S):
            while len(list(descriptors.iterdir())) < DESCRIPTORS:
                await clients.enter_async_context(Client(relay.port))
                await asyncio.sleep(0)
        relay.signal(signal.SIGTERM)
        await relay.event("draining")
        verdict.set()
        assert (await sent)[-1].code == 250
        assert await relay.ended(SLACK_S) == 0
    assert len(relay.rows()) == 1
    assert relay.errors() == ""
