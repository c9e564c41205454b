"""SIGTERM while messages flow: nothing is lost, nothing is unrecorded, the next start finds all in order."""

from __future__ import annotations

import asyncio
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
CONTENT = b"From: a@example.test\r\nX-Task-ID: 1\r\n\r\ntext\r\n"


@pytest.mark.timeout(180)
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
